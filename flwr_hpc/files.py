"""Files that are seen whole or not at all, locks that a killed process lets go of, and seals.

A seal is a file's own note of its sha256: what is hashed once is not hashed again on the same host.
Whoever has hashed a file, as it was written or read, notes that in an extended attribute, which all
hard links to it have. It counts where nothing else can have changed the bytes since: nobody but
this user may write to the file, nobody has, and this host has not been started anew (what lay in
buffers may be lost then). Where a file system has no such attributes, files are hashed as ever.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import resource
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

# Parallel file systems may be mounted without locks; NFS wants a file that can be written.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF)

# Full, over the quota, or mounted read-only: a person has to see to it, and then all goes on.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PROBE_BYTES = 1 << 16
DISK_PAUSE_S = 15.0  # between two looks at a disk that could not be written
SEAL = "user.flwr_hpc.sha256"  # an extended attribute
SEALED_BYTES = 1 << 20  # what is smaller is hashed in no time
TICK_S = 0.01  # of the kernel's clock, at most: what is written within one may have the same time


def is_disk_trouble(error: BaseException) -> bool:
    """Whether an error says that a file system is full or read-only."""
    return isinstance(error, OSError) and error.errno in DISK_TROUBLE


def explain_disk_trouble(error: OSError, folder: Path) -> str:
    """Return what to do about it."""
    where = error.filename if "://" in str(error.filename) else folder  # it may be the server's
    return (
        f"{where} cannot be written: {error.strerror or error}. Free some space there, or have it "
        "mounted for writing; the run waits, and goes on by itself"
    )


def disk_trouble(folder: Path) -> str:
    """Write, sync and remove a small file; say what to do if that cannot be done."""
    probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_bytes(b"\0" * PROBE_BYTES)
        _sync(probe)
    except OSError as exc:
        if is_disk_trouble(exc):
            return explain_disk_trouble(exc, folder)
        raise
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return ""


def wait_until_writable(folder: Path, sleep: Callable[[float], None]) -> None:
    """Wait for a disk in trouble; also where a small file fits, and a large one does not."""
    sleep(DISK_PAUSE_S)
    while disk_trouble(folder):
        sleep(DISK_PAUSE_S)


def keep_files_private() -> None:
    """Let nobody else read what this process and its children write from here on."""
    os.umask(0o077)


def open_many_files() -> None:
    """Let this process open as many files at once as the system allows, if that is more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Do so for a while, in a process that is not ours."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def private_folder(path: Path) -> Path:
    """Make a folder, or take one that is there, which nobody else may enter; return it.

    Says so itself: where the parent has a default ACL, the umask counts for nothing.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o7777
    if mode & 0o077:
        path.chmod(mode & ~0o077)  # and setgid stays: some centres' quotas go by group
    return path


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there and may be looked at."""
    return next(p for p in (path, *path.parents) if os.path.exists(p))


@contextlib.contextmanager
def draft(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary name that is synced and becomes `path` if the block succeeds.

    What is not `durable` need not survive a crash, and is not synced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            sync_dir(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish(path: Path, data: str | bytes) -> None:
    """Write a file so that it is seen whole or not at all, and survives a crash."""
    with draft(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def sync_dir(folder: Path) -> None:
    """Make renames in a folder durable."""
    _sync(folder)


def seal(path: Path, sha256: str) -> None:
    """Note the hash of a file that this process has just written, or read whole.

    Before it is made read-only, or only root could.
    """
    with contextlib.suppress(OSError), open(path, "rb") as file:
        before = os.fstat(file.fileno())
        if not _is_ours(before) or not _boot():
            return
        time.sleep(max(0.0, min(TICK_S, TICK_S + before.st_mtime - time.time())))
        os.setxattr(file.fileno(), SEAL, _text(sha256, before).encode())


def sealed(file: int) -> str:
    """Return the sha256 of an open file, given its descriptor; an empty text if it is not known."""
    with contextlib.suppress(OSError, ValueError):
        status = os.fstat(file)
        if _is_ours(status) and _boot():
            found = os.getxattr(file, SEAL).decode("ascii")
            sha256 = found.partition(" ")[0]
            return sha256 if found == _text(sha256, status) else ""
    return ""


def _is_ours(status: os.stat_result) -> bool:
    """Whether nobody but this user may write to a file, which is worth a note."""
    alone = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return stat.S_ISREG(status.st_mode) and alone and status.st_size >= SEALED_BYTES


def _text(sha256: str, status: os.stat_result) -> str:
    return f"{sha256} {status.st_size} {status.st_mtime_ns} {_boot()}"


@functools.cache
def _boot() -> str:
    """Name this start of this host; an empty text where that cannot be told."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a published JSON object, or None while there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the kernel lets go of it if this process is killed.

    Where the file system knows no locks, it holds among the processes of this host. On one that is
    full or read-only it can be had if it was there before.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open_lock(folder))
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as exc:
            if exc.errno not in NO_LOCKS:
                raise
            file = stack.enter_context(open(_lock_of_this_host(folder), "ab"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_lock(folder: Path) -> IO[bytes]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / "lock", "ab")
    except OSError as exc:
        if not is_disk_trouble(exc) or not (folder / "lock").exists():
            raise
        return open(folder / "lock", "rb")


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file if nobody holds it; a file system without locks counts as free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in NO_LOCKS:
            raise
    return True


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock_of_this_host(folder: Path) -> Path:
    key = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"flwr-hpc-{os.getuid()}-{key}.lock"
