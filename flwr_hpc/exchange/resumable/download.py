"""A payload from a store, in chunks over a few lines, each byte fetched once whatever happens.

Beside the file that grows lies another that says how much of every chunk is in it, so that a later
process goes on with the rest. Both are found by the payload's sha256, and go when it is whole, or
wrong, or nobody has come back to them for a week.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import IO

from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Interrupted, Linked, Transfer
from flwr_hpc.files import try_lock

CHUNK = 8 << 20
STREAMS = 4
PIECE = 1 << 20  # bytes hashed at a time
# Partial files in a folder: older ones are removed, and more, unless they have just grown.
AGE_S, COUNT, IDLE_S = 7 * 86400.0, 8, 3600.0
PART, MARKS = ".part", ".marks"
MARK = struct.Struct("<I")  # bytes of a chunk that are here


# ``read(first, end)``: the bytes from `first` to before `end`, in pieces that need not come again.
Read = Callable[[int, int], Generator[bytes, None, None]]
# ``persist(attempt, transfer)``: calls ``attempt(read)`` until it succeeds, each time with what
# reads over a line that may work, or for as long as `transfer` moves.
Persist = Callable[[Callable[[Read], None], Transfer], None]


def download(
    persist: Persist,
    ref: Reference,
    folder: Path,
    target: Path,
    transfer: Transfer,
    now: Callable[[], float] = time.time,
) -> None:
    """Fetch a payload into `target`, and check it; what there is of it in `folder` counts.

    BadPayload if it is not what the reference says, OSError if it cannot be had or written.
    """
    transfer.total = ref.bytes
    sweep(folder, now())
    with _partial(folder, ref) as (data, marks):
        part = _Part(persist, ref, data, marks, transfer)
        digest = part.fetch()
        if digest != ref.sha256 and part.continued:
            part.forget()  # an earlier attempt's bytes were spoilt, as by a crash of this machine
            digest = part.fetch()
        if digest != ref.sha256:
            part.discard()
            raise BadPayload(f"payload {ref.key} has the sha256 {digest}")
        os.replace(data.name, target)
        # Last: who finds no marks begins anew, in a file of its own.
        Path(marks.name).unlink(missing_ok=True)


def sweep(folder: Path, now: float) -> None:
    """Remove what interrupted downloads have left there for too long."""
    moved_at = {}
    for path in folder.glob(f".*{PART}"):
        with suppress(FileNotFoundError):  # whole by now
            moved_at[path] = path.stat().st_mtime
    for i, path in enumerate(sorted(moved_at, key=lambda path: -moved_at[path])):
        if moved_at[path] < now - (IDLE_S if i >= COUNT else AGE_S):
            path.with_suffix(MARKS).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


@contextmanager
def _partial(folder: Path, ref: Reference) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open what there is of a payload, for this process alone."""
    with ExitStack() as stack:
        name = f".{ref.sha256}"
        marks = stack.enter_context(_open(folder / f"{name}{MARKS}"))
        if not try_lock(marks) or not _is_there(marks):  # another process fetches the same, or
            # just has: leave it its own
            name = f"{name}.{uuid.uuid4().hex[:8]}"
            marks = stack.enter_context(_open(folder / f"{name}{MARKS}"))
        yield stack.enter_context(_open(folder / f"{name}{PART}")), marks


def _is_there(file: IO[bytes]) -> bool:
    """Whether an open file still has its name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    return False


def _open(path: Path) -> IO[bytes]:
    return open(path, "r+b", 0, opener=lambda name, how: os.open(name, how | os.O_CREAT, 0o600))


class _Part:
    """A payload of which some chunks are here."""

    def __init__(
        self,
        persist: Persist,
        ref: Reference,
        data: IO[bytes],
        marks: IO[bytes],
        transfer: Transfer,
    ) -> None:
        self._persist, self._ref, self._transfer = persist, ref, Linked(transfer)
        self._data, self._marks = data, marks
        self.continued = False  # whether some of it is from an earlier attempt

    def fetch(self) -> str:
        """Fetch what is missing, and return the sha256, computed as the chunks come in order."""
        count = -(-self._ref.bytes // CHUNK)
        if os.fstat(self._data.fileno()).st_size != self._ref.bytes:
            os.ftruncate(self._marks.fileno(), 0)  # they are of a file that is gone
        marks = os.pread(self._marks.fileno(), count * MARK.size, 0).ljust(count * MARK.size, b"\0")
        os.ftruncate(self._data.fileno(), self._ref.bytes)
        digest = hashlib.sha256()
        pool = ThreadPoolExecutor(STREAMS, thread_name_prefix="exchange")
        try:
            here = [n for (n,) in MARK.iter_unpack(marks)]
            self.continued = any(here)
            coming = [pool.submit(self._chunk, i, n) for i, n in enumerate(here)]
            for i, chunk in enumerate(coming):
                chunk.result()
                self._hash(i, digest)
        except BaseException:
            self._transfer.cancel()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return digest.hexdigest()

    def forget(self) -> None:
        """Have none of it count as fetched."""
        os.ftruncate(self._marks.fileno(), 0)
        self._transfer.advance(-self._ref.bytes)

    def discard(self) -> None:
        """Remove what turned out to be wrong."""
        for file in (self._data, self._marks):
            Path(file.name).unlink(missing_ok=True)

    def _hash(self, i: int, digest: hashlib._Hash) -> None:
        at, end = self._span(i)
        while at < end:
            piece = os.pread(self._data.fileno(), min(PIECE, end - at), at)
            digest.update(piece)
            at += len(piece)

    def _chunk(self, i: int, count: int) -> None:
        """Fetch a chunk of which `count` bytes are here, and note how far it is."""
        first, end = self._span(i)
        at = min(first + count, end)
        self._transfer.advance(at - first)

        def attempt(read: Read) -> None:
            nonlocal at
            with closing(read(at, end)) as pieces:
                for piece in pieces:
                    at = self._write(at, end, piece)
                    os.pwrite(self._marks.fileno(), MARK.pack(at - first), i * MARK.size)
            if at < end:
                raise Interrupted(f"{end - at} bytes of a chunk are missing")

        if at < end:
            self._persist(attempt, self._transfer)

    def _write(self, at: int, end: int, piece: bytes) -> int:
        if at + len(piece) > end:
            raise BadPayload(f"the store sends more bytes of {self._ref.key} than asked")
        left = memoryview(piece)
        while left:
            written = os.pwrite(self._data.fileno(), left, at)
            at, left = at + written, left[written:]
        self._transfer.advance(len(piece))
        return at

    def _span(self, i: int) -> tuple[int, int]:
        return i * CHUNK, min((i + 1) * CHUNK, self._ref.bytes)
