"""Bytes from a place that others write to into a file of one's own: counted, hashed, bounded."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from contextlib import suppress
from typing import IO

from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.files import sealed

PIECE = 1 << 18  # bytes moved at a time, of each of the payloads that come together
SENT = 8 << 20  # bytes that the kernel copies at a time
FICLONE = 0x40049409  # Linux: have one file share another's blocks until either is written to


class Cancelled(Exception):
    """Nobody waits for this transfer any more."""


class Interrupted(OSError):
    """An attempt that may go better next time."""


class Transfer:
    """How far one transfer is, for who waits beside it, and the word to end it.

    Attributes
    ----------
    done : int
        Bytes moved or checked so far.
    total : int
        Bytes there are, 0 while that is not known.
    begun : bool
        Whether there is something to move.
    """

    def __init__(self) -> None:
        self.done = 0
        self.total = 0
        self.begun = False
        self._cancelled = False
        self._lock = threading.Lock()  # a payload may come in several streams

    def advance(self, count: int) -> None:
        """Count bytes; Cancelled if nobody waits for them."""
        if self._cancelled:
            raise Cancelled
        self.begun = True
        with self._lock:
            self.done += count

    def cancel(self) -> None:
        """End it at its next piece."""
        self._cancelled = True


class Linked(Transfer):
    """Part of another transfer: ends with that, or alone."""

    def __init__(self, whole: Transfer) -> None:
        super().__init__()
        self._whole = whole

    def advance(self, count: int) -> None:
        """Count bytes of both."""
        super().advance(count)
        self._whole.advance(count)


def copy_exactly(source: IO[bytes], target: IO[bytes], count: int, transfer: Transfer) -> str:
    """Copy a file of `count` bytes to an empty one; return the sha256 of what arrived.

    No byte beyond `count` is read or written. Where the file system can, blocks are shared and
    not copied; they are hashed as they lie in the target, which nobody else writes to. A source
    that is hashed already on this host, and does not change meanwhile, is not hashed again.

    Raises
    ------
    BadPayload
        If there are fewer or more bytes.
    """
    known = _known(source, count)
    if _clone(source, target) or (known and _send(source, target, count, transfer)):
        if os.fstat(target.fileno()).st_size != count:
            raise BadPayload(f"the payload did not keep its {count} bytes while it was fetched")
        if known and _known(source, count) == known:
            return known
        os.lseek(target.fileno(), 0, os.SEEK_SET)
        return _hash(target, None, count, transfer)
    digest = _hash(source, target, count, transfer)
    if source.read(1):
        raise BadPayload(f"the payload has more than the {count} bytes that were announced")
    return digest


def _send(source: IO[bytes], target: IO[bytes], count: int, transfer: Transfer) -> bool:
    """Have the kernel copy a file; tell whether it could."""
    done = 0
    with suppress(OSError):
        while done < count:
            sent = os.sendfile(target.fileno(), source.fileno(), done, min(count - done, SENT))
            if not sent:
                break
            transfer.advance(sent)
            done += sent
    if done < count:
        transfer.advance(-done)
        os.lseek(target.fileno(), 0, os.SEEK_SET)
    return done == count


def _known(source: IO[bytes], count: int) -> str:
    """Return what a file of `count` bytes is known to hash to; an empty text if it is none."""
    with suppress(OSError, AttributeError, ValueError):
        if os.fstat(source.fileno()).st_size == count:
            return sealed(source.fileno())
    return ""


def _hash(source: IO[bytes], target: IO[bytes] | None, count: int, transfer: Transfer) -> str:
    digest, left = hashlib.sha256(), count
    while left:
        transfer.advance(0)
        piece = source.read(min(left, PIECE))
        if not piece:
            raise BadPayload(f"the payload has {count - left} bytes, expected {count}")
        digest.update(piece)
        if target is not None:
            target.write(piece)
        left -= len(piece)
        transfer.advance(len(piece))
    return digest.hexdigest()


def _clone(source: IO[bytes], target: IO[bytes]) -> bool:
    with suppress(OSError, AttributeError, ValueError):  # no such files, or not on one file system
        fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
        return True
    return False
