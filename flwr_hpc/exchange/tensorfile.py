"""safetensors files, written and read one tensor at a time: the only reader and writer there is.

Server, sites, trainers and checkpoints use it alike. The library judges whether a file is valid
and reads what others wrote; its writer wants all tensors at once, ours one. Nothing that another
site wrote is trusted: whatever is wrong with a file ends in `BadPayload`. No torch.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from flwr_hpc.exchange.tensors import (
    STORED,
    BadPayload,
    Layout,
    Shaped,
    TensorInfo,
    Tensors,
    size_range,
)
from flwr_hpc.files import draft, seal, sealed

FORMAT = {"format": "pt"}  # what transformers asks of a checkpoint's metadata
MAX_HEADER = 8 << 20  # bytes; some 60,000 tensors
ENTRY, METADATA = 128, 4096  # bytes of a header, at most: for a tensor but its name; for the rest
PIECE = 1 << 18  # bytes copied, or numbers decoded, at a time
HASHED = 1 << 20  # bytes written and hashed at a time


class Blocks(Shaped, Protocol):
    """An array that comes as its flat blocks, in order."""

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Yield the blocks."""


Numbers = NDArray[Any] | Blocks


class TensorFile(Tensors):
    """A safetensors file whose tensors are memory-mapped, each by itself.

    A mapping lives as long as the array over it, so pages of tensors that are done with do
    not stay in the process. Arrays are private copies on write. The open file outlives its
    name: deleting it on disk does not harm a reader, unless that has `let_go` of it.

    Parameters
    ----------
    path : Path
    sha256 : str or None
        Of the file, where known; else computed when first asked for.
    layout : Layout or None
        Names and shapes that are expected: no larger header than theirs is read.

    Raises
    ------
    BadPayload
        If the file is not a whole, valid safetensors file.
    """

    def __init__(self, path: Path, sha256: str | None = None, layout: Layout | None = None) -> None:
        self.path = path
        self._sha256 = sha256
        self._file = open(path, "rb")  # noqa: SIM115 - stays open as long as the object lives
        self._stat = os.fstat(self._file.fileno())
        limit = MAX_HEADER if layout is None else max_header(layout)
        found, self._starts = _read_header(self._file, path, limit)
        self.layout = _shared(found, layout or {})

    @property
    def sha256(self) -> str:
        """Hex digest of the whole file."""
        if self._sha256 is None:
            with self._opened() as file:
                file.seek(0)
                self._sha256 = _sha256_of(file)
        return self._sha256

    @property
    def in_place(self) -> bool:
        """Whether this very file still lies under its name."""
        try:
            return os.path.samestat(os.stat(self.path), self._stat)
        except OSError:
            return False

    def raw(self, name: str) -> NDArray[Any]:
        """Map one tensor."""
        info = self.layout[name]
        if info.nbytes == 0:
            return np.empty(info.shape, info.stored)
        skip = self._starts[name] % mmap.ALLOCATIONGRANULARITY
        with self._opened() as file:
            view = mmap.mmap(
                file.fileno(),
                info.nbytes + skip,
                access=mmap.ACCESS_COPY,
                offset=self._starts[name] - skip,
            )
        return np.frombuffer(view, info.stored, info.size, skip).reshape(info.shape)

    def let_go(self) -> None:
        """Close the file; it is opened for each read."""
        self._file.close()

    def _opened(self) -> AbstractContextManager[BufferedReader]:
        return open(self.path, "rb") if self._file.closed else nullcontext(self._file)


def sha256_of(path: Path) -> str:
    """Hex digest of a file: as noted on this host, or read in small pieces."""
    with open(path, "rb") as f:
        return _sha256_of(f)


def _sha256_of(file: BufferedReader) -> str:
    return sealed(file.fileno()) or hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Numbers]], layout: Layout) -> str:
    """Write tensors as they come; return the file's sha256.

    The file appears whole or not at all.

    Parameters
    ----------
    path : Path
    tensors : iterable of (str, NDArray or Blocks)
        In the order of `layout`; the stored bits (uint16 for ``BF16``).
    layout : Layout

    Raises
    ------
    ValueError
        If the tensors are not those of the layout, or its order would leave one misaligned
        (see `aligned`).
    """
    expected = iter(layout.items())
    with draft(path) as temporary:
        with _Hashing(temporary) as f:
            f.write(_header(layout))
            for name, array in tensors:
                wanted, info = next(expected, ("no further tensor", TensorInfo("", ())))
                if name != wanted or (array.dtype, array.shape) != (info.stored, info.shape):
                    found = f"'{name}' {array.dtype} {array.shape}"
                    raise ValueError(f"{path}: found {found}, expected '{wanted}' {info}")
                for block in _blocks(array):
                    f.write(_bytes(block))
            if rest := next(expected, None):
                raise ValueError(f"{path}: tensor '{rest[0]}' is missing")
        seal(temporary, f.sha256)
    return f.sha256


def write_stream(path: Path, tensors: Iterable[tuple[str, Numbers]]) -> str:
    """Write tensors whose names and shapes are not known beforehand; return the file's sha256.

    A safetensors file begins with its table of contents, so the numbers go to a second file
    first; it costs the disk twice the writing, and the memory nothing.
    """
    layout: dict[str, TensorInfo] = {}
    starts: dict[str, int] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as body:
        for name, array in tensors:
            if name in layout:
                raise ValueError(f"{path}: tensor '{name}' comes twice")
            layout[name], starts[name] = TensorInfo.of(array), body.tell()
            for block in _blocks(array):
                body.write(_bytes(block))
        ordered = aligned(layout)
        with draft(path) as temporary:
            with _Hashing(temporary) as f:
                f.write(_header(ordered))
                for name, info in ordered.items():
                    body.seek(starts[name])
                    _copy(body, f, info.nbytes)
            seal(temporary, f.sha256)
    return f.sha256


class _Hashing:
    """A new file, hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `__exit__`
        self._digest = hashlib.sha256()

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        """Hex digest of what was written."""
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes, some at a time: they are hashed while the processor still has them."""
        for start in range(0, len(data), HASHED):
            piece = data[start : start + HASHED]
            self._file.write(piece)
            self._digest.update(piece)


def save(tensors: Tensors, path: Path) -> str:
    """Have `path` hold these tensors; return its sha256.

    What is a file already is linked where that works: nothing is copied, so neither name must
    be written to again.
    """
    if isinstance(tensors, TensorFile) and tensors.in_place:
        with draft(path) as temporary:
            link_or_copy(tensors.path, temporary)
        return tensors.sha256
    layout = aligned(tensors.layout)
    return write_safetensors(path, ((name, _numbers(tensors, name)) for name in layout), layout)


class _Pieces:
    """A tensor's values, read some at a time."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        self._tensors, self._name = tensors, name
        self._size, self.shape = tensors.layout[name].size, tensors.layout[name].shape
        self.dtype = tensors.layout[name].stored

    def __iter__(self) -> Iterator[NDArray[Any]]:
        read = self._tensors.reader(self._name)
        for start in range(0, self._size, PIECE):
            yield read(slice(start, start + PIECE))


def _numbers(tensors: Tensors, name: str) -> Numbers:
    """Return a tensor as it is stored; its values are that where they are no half precision."""
    info = tensors.layout[name]
    return _Pieces(tensors, name) if info.widened == info.stored else tensors.raw(name)


def link_or_copy(source: Path, target: Path) -> None:
    """Have `target` hold what `source` does, by a hard link where that works."""
    try:
        os.link(source, target)
    except OSError:  # another file system, a foreign owner, or no hard links here
        with open(source, "rb") as a, open(target, "wb") as b:
            shutil.copyfileobj(a, b, PIECE)


def aligned(layout: Layout) -> dict[str, TensorInfo]:
    """Order a layout by falling item size, so that every tensor starts aligned."""
    return dict(sorted(layout.items(), key=lambda item: -item[1].stored.itemsize))


def max_header(layout: Layout) -> int:
    """Return how long the header of a layout's file is at most, whoever wrote it."""
    entries = (len(json.dumps(name)) + ENTRY + 24 * len(i.shape) for name, i in layout.items())
    return METADATA + sum(entries)


def file_size_range(layout: Layout, accept: Collection[str] = ()) -> tuple[int, int]:
    """Return how many bytes a layout's file has; its floats may have the dtypes in `accept`."""
    low, high = size_range(layout, accept)
    return 8 + low, 8 + max_header(layout) + high


def _copy(source: IO[bytes], target: _Hashing, count: int) -> None:
    while count > 0:
        piece = source.read(min(count, PIECE))
        if not piece:
            raise EOFError("a file of ours became shorter while it was read")
        target.write(piece)
        count -= len(piece)


def _blocks(array: Numbers) -> Iterable[NDArray[Any]]:
    return [array] if isinstance(array, np.ndarray | np.generic) else array


def _bytes(array: NDArray[Any]) -> memoryview:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def _header(layout: Layout) -> bytes:
    entries: dict[str, Any] = {"__metadata__": FORMAT}
    offset = 0
    for name, info in layout.items():
        if offset % info.stored.itemsize:
            raise ValueError(f"tensor '{name}' would be misaligned; order the layout")
        end = offset + info.nbytes
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_header(
    f: IO[bytes], path: Path, limit: int
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Return layout and absolute offsets; the library judges whether they are valid."""
    length = int.from_bytes(f.read(8), "little")
    if length > limit:
        raise BadPayload(f"{path.name}: the header claims {length} bytes, expected {limit} at most")
    try:
        with safe_open(path, framework="numpy"):
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        layout = {n: TensorInfo(e["dtype"], tuple(e["shape"])) for n, e in header.items()}
    except (SafetensorError, ValueError, RecursionError) as exc:
        raise BadPayload(f"{path.name}: not a valid safetensors file: {exc}") from None
    for name, info in layout.items():
        if info.dtype not in STORED:
            raise BadPayload(f"{path.name}: tensor '{name}' has unknown dtype {info.dtype}")
    starts = {n: 8 + length + int(e["data_offsets"][0]) for n, e in header.items()}
    return layout, starts


def _shared(found: Layout, expected: Layout) -> Layout:
    """Return the layout, in objects of the expected one: a model in shards has many files."""
    same = found == expected and list(found) == list(expected)
    return expected if same else found
