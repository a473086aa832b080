"""What is hashed once is not hashed again on the same host: a file's own note of its sha256.

Whoever has hashed a file, as it was written or read, notes that in an extended attribute, which
all hard links to it have. It counts where nothing else can have changed the bytes since: nobody
but this user may write to the file, nobody has, and this host has not been started anew (what lay
in buffers may be lost then). Where a file system has no such attributes, files are hashed as ever.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

ATTRIBUTE = "user.flwr_hpc.sha256"
WORTH = 1 << 20  # bytes: what is smaller is hashed in no time
TICK_S = 0.01  # of the kernel's clock, at most: what is written within one may have the same time


def seal(path: Path, sha256: str) -> None:
    """Note the hash of a file that this process has just written, or read whole.

    Before it is made read-only, or only root could.
    """
    with suppress(OSError), open(path, "rb") as file:
        before = os.fstat(file.fileno())
        if not _is_ours(before) or not _boot():
            return
        time.sleep(max(0.0, min(TICK_S, TICK_S + before.st_mtime - time.time())))
        os.setxattr(file.fileno(), ATTRIBUTE, _text(sha256, before).encode())


def sealed(file: int) -> str:
    """Return the sha256 of an open file, given its descriptor; an empty text if it is not known."""
    with suppress(OSError, ValueError):
        status = os.fstat(file)
        if _is_ours(status) and _boot():
            found = os.getxattr(file, ATTRIBUTE).decode("ascii")
            sha256 = found.partition(" ")[0]
            return sha256 if found == _text(sha256, status) else ""
    return ""


def _is_ours(status: os.stat_result) -> bool:
    """Whether nobody but this user may write to a file, which is worth a note."""
    alone = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return stat.S_ISREG(status.st_mode) and alone and status.st_size >= WORTH


def _text(sha256: str, status: os.stat_result) -> str:
    return f"{sha256} {status.st_size} {status.st_mtime_ns} {_boot()}"


@cache
def _boot() -> str:
    """Name this start of this host; an empty text where that cannot be told."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
