"""Checks on a login node: the working folder, its space, model and data."""

from __future__ import annotations

import getpass
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

from flwr_hpc.config.schema import ModelConfig
from flwr_hpc.config.validate import size_key
from flwr_hpc.data import sources
from flwr_hpc.doctor.findings import Finding, failed, passed, skipped, warned
from flwr_hpc.doctor.login import Login, login
from flwr_hpc.doctor.outside import hub_url
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.store import make_store
from flwr_hpc.exchange.stores.fsspec import connect, explain
from flwr_hpc.files import existing
from flwr_hpc.server import preflight
from flwr_hpc.spool.disk_use import site_disk

WORKDIR = "working folder"
GB = 10**9
LEAST_BYTES = 1 * GB
UNKNOWN_BYTES = 5 * GB
LEAST_FILES = 10_000
# Of one host alone; the rest is taken for shared until the probe job says otherwise.
OWN = ("ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "ramfs", "zfs")


@login(WORKDIR)
def workdir(here: Login) -> Finding:
    """Write a file where jobs will work, and look at what file system that is."""
    base = existing(here.root)
    fix = f"{here.set('workdir')}=/path/on/the/shared/file/system"
    draft = base / f".flwr-hpc-{secrets.token_hex(4)}"
    try:
        draft.write_text("x")
        draft.unlink()
    except OSError as exc:
        return failed(f"{here.root} cannot be written: {exc.strerror}", fix)
    if trouble := _trouble(here):
        return failed(f"{here.root}: {trouble}", fix)
    device, kind = here.outside.mount(base.resolve())
    if not here.local and kind in OWN:
        return warned(
            f"{here.root} is on {kind} ({device}), which other hosts hardly see",
            f"{fix}, unless the probe job shows that it is shared",
        )
    roots = _shared_roots(here)
    places = (here.root, base.resolve())
    if roots and not any(p.is_relative_to(r) for p in places for r in (*roots, *_real(roots))):
        listed = ", ".join(map(str, roots))
        return warned(
            f"{here.root} is on none of the file systems that this facility's file knows to be "
            f"shared: {listed}",
            f"{fix}, unless the probe job shows that it is shared",
        )
    return passed(f"{here.root}{f' ({kind})' * bool(kind)}")


def _shared_roots(here: Login) -> list[Path]:
    """Return the file's shared file systems, less those whose variable is not set here."""
    named = (os.path.expandvars(root) for root in here.facility.shared_roots)
    return [Path(root) for root in named if "$" not in root]


def _real(paths: list[Path]) -> list[Path]:
    return [path.resolve() for path in paths]


def _trouble(here: Login) -> str:
    """Return what in the path job scripts or containers stumble over."""
    text = str(here.root)
    if not text.isprintable():
        return "the path holds a character that cannot be printed"
    if here.facility.container and any(c in text for c in ":,"):
        return "containers take no ':' or ',' in the path of a folder"
    return ""


@login("free space", needs=[WORKDIR])
def space(here: Login) -> Finding:
    """Compare the file system's free space with what a run keeps at a time."""
    need = needed_bytes(here.config.model)
    free, files = here.outside.free(existing(here.root))
    fix = f"make room, or name another place: {here.set('workdir')}=/path"
    if free < need:
        return failed(f"{_gb(free)} free, a run of this model needs about {_gb(need)}", fix)
    if 0 <= files < LEAST_FILES:
        return failed(f"room for {files} more files only (inodes)", fix)
    return passed(f"{_gb(free)} free, a run of this model needs about {_gb(need)}")


@login("quota", needs=[WORKDIR])
def quota(here: Login) -> Finding:
    """Ask for the quotas that hold in the working folder: this user's and, on Lustre, others'."""
    base = existing(here.root).resolve()
    device, kind = here.outside.mount(base)
    if kind == "lustre" and here.outside.which("lfs"):
        rows = _lustre_usage(here, base)
    elif here.outside.which("quota"):
        answer = here.outside.ask("quota", "-w", "-p")  # it ends with 1 when over the quota
        rows = [row for row in usage(answer.out) if row["of"] == device]
    else:
        return skipped("no quota command for this file system here; the centre has one of its own")
    if not rows:
        return skipped(f"none told for {base}")
    both = [quota_left(row) for row in rows]
    left = min((n for n, _ in both if n is not None), default=None)
    files = min((n for _, n in both if n is not None), default=None)
    need = needed_bytes(here.config.model)
    found = "no limit" if left is None else f"{_gb(left)} left"
    found += "" if files is None else f", {files} files left"
    if (left is not None and left < need) or (files is not None and files < LEAST_FILES):
        return failed(
            f"{found}; a run of this model needs about {_gb(need)}",
            f"delete old runs, or name another place: {here.set('workdir')}=/path",
        )
    return passed(found)


def _lustre_usage(here: Login, base: Path) -> list[dict[str, Any]]:
    """Ask for the quotas of the user, of the group that new files will have, and of the project."""
    found = base.stat()
    group = found.st_gid if found.st_mode & stat.S_ISGID else os.getgid()
    owners = [("-u", getpass.getuser()), ("-g", str(group))]
    project = here.outside.ask("lfs", "project", "-d", str(base)).out.split()
    if project and project[0].isdigit() and int(project[0]):
        owners.append(("-p", project[0]))
    answers = (here.outside.ask("lfs", "quota", "-q", *owner, str(base)) for owner in owners)
    return [row for answer in answers for row in usage(answer.out)]


def usage(text: str) -> list[dict[str, Any]]:
    """Read the rows of ``lfs quota -q`` or ``quota -w -p``: kB and files, used and allowed."""
    words = [line.split() for line in text.splitlines() if line.strip()]
    if len(words) == 2 and len(words[0]) == 1:  # lfs breaks the line after a long path
        words = [words[0] + words[1]]
    rows = []
    for of, *rest in words:
        numbers = [w.strip("*[]") for w in rest]  # over the limit; a part that did not answer
        if len(rest) >= 7 and all(numbers[k].isdigit() for k in (0, 1, 2, 4, 5, 6)):
            keys = ("kb", "kb_soft", "kb_hard", "grace", "files", "files_soft", "files_hard")
            values = (int(n) if n.isdigit() else 0 for n in numbers)
            rows.append({"of": of} | dict(zip(keys, values, strict=False)))
    return rows


def quota_left(row: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the bytes and files left to the soft limits, else the hard ones; None: no limit."""
    limits = [row[f"{k}_soft"] or row[f"{k}_hard"] for k in ("kb", "files")]
    left = [max(0, n - row[k]) if n else None for n, k in zip(limits, ("kb", "files"), strict=True)]
    return (None if left[0] is None else left[0] * 1024), left[1]


def needed_bytes(model: ModelConfig) -> int:
    """Return about what a run of a model keeps on disk at a time."""
    n = parameters(model)
    return UNKNOWN_BYTES if n is None else max(LEAST_BYTES, site_disk(n).total)


def parameters(model: ModelConfig) -> int | None:
    """Return about how many parameters are trained; None if that cannot be told from here."""
    if model.lora.r > 0:
        return None
    if model.path:
        files = list(Path(model.path).expanduser().glob("*.safetensors"))
        return sum(f.stat().st_size for f in files) // 2 or None  # as bf16
    sizes = model.config
    try:
        names = "hidden_size", "num_hidden_layers", "intermediate_size"
        width_key, depth_key, inner_key = (size_key(sizes, name) for name in names)
        width, depth = int(sizes[width_key]), int(sizes[depth_key])
        inner = int(sizes.get(inner_key) or 4 * width)
        words = int(sizes.get("vocab_size", 512))
    except (KeyError, TypeError, ValueError):
        return None
    return depth * (4 * width * width + 3 * width * inner) + 2 * words * width


@login("model and tokenizer")
def model(here: Login) -> Finding:
    """Look for model and tokenizer where the jobs will."""
    config = here.config
    if here.facility.container:
        return skipped("looked for inside the container, by the job")
    try:
        preflight.check_pretrained(config, here.name, here.facility)
    except UserError as exc:
        return failed(str(exc), "")
    tokenizer = config.data.tokenizer or ("its own tokenizer" if config.model.path else "byte")
    return passed(f"{config.model.path or 'from random weights'}, {tokenizer}")


@login("data")
def data(here: Login) -> Finding:
    """Read the beginning of the facility's data."""
    if here.facility.container:
        return skipped("looked for inside the container, by the job")
    try:
        sources.check(here.config.data, here.name, list(here.config.facilities))
    except UserError as exc:
        return failed(str(exc), "")
    return passed(f"{here.config.data.kind}, readable")


@login("exchange store")
def store(here: Login) -> Finding:
    """Take a small payload there and back, and remove it."""
    if not here.config.exchange.store:
        return skipped("in the run directory")
    place = f"{here.config.exchange.store.rstrip('/')}/doctor-{secrets.token_hex(4)}"
    try:
        _there_and_back(place)
    except Exception as exc:  # each of fsspec's file systems has its own kinds
        return failed(
            f"{place}: {explain(exc)}",
            "exchange.store=URL of a place that server and sites may write to; what a scheme needs "
            "is on its fsspec page (packages, credentials)",
        )
    return passed(place.rpartition("/")[0])


def _there_and_back(place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        payload = Path(folder) / "payload"
        payload.write_bytes(secrets.token_bytes(1024))
        reference = make_store(place).put(payload)
        make_store(place).get(reference, Path(folder) / "back")
    fs, path = connect(place)
    fs.rm(path, recursive=True)


@login("Hugging Face from here")
def hub(here: Login) -> Finding:
    """Try the hub if a model or tokenizer is named by its name there."""
    names = [n for n in (here.config.model.path, here.config.data.tokenizer) if n]
    hub_names = [n for n in names if n != "byte" and not Path(n).expanduser().is_dir()]
    if not hub_names or not here.facility.internet:
        return skipped("not needed")
    url = hub_url({**os.environ, **here.facility.env})
    if fault := here.outside.reach(url):
        return failed(
            f"{url}: {fault}",
            f"fetch {', '.join(hub_names)} elsewhere and name the folder, or set https_proxy",
        )
    return passed(url)


def _gb(n: float) -> str:
    return f"{n / GB:.1f} GB" if n < 100 * GB else f"{n / GB:.0f} GB"
