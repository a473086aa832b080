"""One launcher at a time per site folder and host."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# Parallel file systems may be mounted without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of a site's folder; the kernel lets go of it if this process is killed."""
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(root / "lock", "ab"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as exc:
            if exc.errno not in NO_LOCKS:
                raise
            file = stack.enter_context(open(_elsewhere(root), "ab"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(file: IO[str]) -> bool:
    """Lock an open file if nobody holds it; a file system without locks counts as free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in NO_LOCKS:
            raise
    return True


def _elsewhere(root: Path) -> Path:
    key = hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"flwr-hpc-{os.getuid()}-{key}.lock"
