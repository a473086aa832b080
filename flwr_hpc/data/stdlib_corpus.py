"""The source code of the installed Python's standard library as a corpus, by package.

It is on every machine, needs no network, and its parts differ in kind, so facilities with
different packages have visibly different (non-IID) data.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr_hpc.errors import UserError, closest

Packages = dict[str, tuple[Path, ...]]

# Tests are left out: where they lie differs between versions, and some distributions lack them.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

# Kinds of code, from tables and prose to programs that talk to each other. Facilities get
# contiguous pieces of this order. Packages named nowhere go where "*" stands.
_THEMES = (
    ("tables", "encodings html stringprep opcode token keyword mimetypes locale _compat_pickle"),
    ("prose", "pydoc_data this __future__ _sitebuiltins"),
    ("windows", "turtledemo turtle idlelib tkinter curses colorsys webbrowser"),
    ("builds", "distutils lib2to3 ensurepip venv sysconfig _osx_support _aix_support"),
    ("developing", "unittest doctest pydoc pdb bdb cmd code codeop trace timeit profile cProfile"),
    ("developing", "pstats dis inspect ast tokenize pickletools pyclbr symtable compileall"),
    ("numbers", "_pydecimal decimal statistics fractions numbers random datetime _pydatetime"),
    ("numbers", "_strptime calendar zoneinfo heapq bisect"),
    ("core", "*"),
    ("formats", "email mailbox mailcap xml json csv configparser plistlib tomllib base64 quopri"),
    ("formats", "tarfile zipfile gzip bz2 lzma compression shelve pickle"),
    ("network", "socket socketserver ssl http urllib xmlrpc wsgiref ftplib imaplib smtplib"),
    ("network", "smtpd nntplib poplib telnetlib ipaddress asyncore asynchat"),
    ("concurrency", "threading queue sched selectors subprocess concurrent multiprocessing"),
    ("concurrency", "asyncio"),
)
_ORDER = {name: i for i, name in enumerate(" ".join(names for _, names in _THEMES).split())}


class NotVisibleError(UserError):
    """Data is not to be seen here: an error on this machine, perhaps not at a facility."""


def packages(root: Path | None = None) -> Packages:
    """Return the source files of every top-level package or module, names and files sorted.

    Parameters
    ----------
    root : Path, optional
        The standard library's folder; default: the running Python's.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir()) if root.is_dir() else []:
        name = entry.name.removesuffix(".py")
        if not name.isidentifier() or entry.name in _SKIPPED:  # site-packages may be vast
            continue
        for path in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]:
            source = path.suffix == ".py" and not _SKIPPED & set(path.relative_to(root).parts)
            if source and path.stat().st_size:
                found.setdefault(name, []).append(path)
    if not found:
        raise UserError(
            f"data=stdlib: {root} holds no Python source files. "
            "Use another Python, or your own files: data=text 'data.paths.FACILITY=[/path/*.txt]'"
        )
    return {name: tuple(files) for name, files in found.items()}


def deal(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Deal packages out into `count` shares of about equal size and different kind.

    The packages are ordered by kind of code and cut into contiguous pieces: a piece is closed
    as soon as it holds its part of what is left.

    Parameters
    ----------
    sizes : mapping of str to int
        Bytes per package.
    count : int
        Number of shares; none is empty.
    """
    if len(sizes) < count:
        raise UserError(
            f"data=stdlib: {len(sizes)} packages cannot be dealt out among {count} facilities"
        )
    order = sorted(sizes, key=lambda name: (_ORDER.get(name, _ORDER["*"]), name))
    left = sum(sizes.values())
    shares: list[list[str]] = []
    for pieces in range(count, 0, -1):
        share: list[str] = []
        target, held = left / pieces, 0
        while order and len(order) >= pieces:  # each later share gets at least one
            size = sizes[order[0]]
            if share and pieces > 1 and held + size / 2 > target:
                break
            share.append(order.pop(0))
            held += size
        left -= held
        shares.append(share)
    return shares


def share(
    facility: str,
    facilities: Sequence[str],
    chosen: Mapping[str, Sequence[str]],
    available: Packages | None = None,
) -> Packages:
    """Return the packages of one facility: those chosen for it, or its share of the others.

    The result does not depend on the order of `facilities`.

    Parameters
    ----------
    facility : str
    facilities : sequence of str
        All facilities of the federation.
    chosen : mapping of str to sequence of str
        Package names per facility (``data.paths``).
    available : dict, optional
        What `packages` returned.

    Raises
    ------
    NotVisibleError
        For a name that is no package of this Python's standard library.
    """
    available = packages() if available is None else available
    if chosen.get(facility):
        return {name: _known(name, facility, available) for name in chosen[facility]}
    taken = {name for names in chosen.values() for name in names}
    sizes = {
        name: sum(file.stat().st_size for file in files)
        for name, files in available.items()
        if name not in taken
    }
    others = sorted({facility, *facilities} - {f for f, names in chosen.items() if names})
    names = deal(sizes, len(others))[others.index(facility)]
    return {name: available[name] for name in names}


def _known(name: str, facility: str, available: Packages) -> tuple[Path, ...]:
    if name in available:
        return available[name]
    raise NotVisibleError(
        f"data.paths.{facility}: '{name}' is no package of this Python's standard library."
        f"{closest(name, available)} It has {len(available)}, for example asyncio, email, "
        f"encodings. Example: 'data.paths.{facility}=[asyncio,email]'"
    )
