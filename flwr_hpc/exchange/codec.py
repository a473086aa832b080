"""What the bytes of a payload are: safetensors files, written one tensor at a time.

The reading half is in `tensors`; it is offered here too, so that this is the one place to
import a payload's names from. No torch.
"""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.exchange.tensors import Layout, TensorFile, TensorInfo, Tensors
from flwr_hpc.files import draft

FORMAT = {"format": "pt"}  # what transformers asks of a checkpoint's metadata
PIECE = 1 << 20  # bytes copied at a time


class Codec(ABC):
    """Turns tensors into a payload file and back.

    A later codec (deltas, int8) says what the bytes are relative to `base`, the version of the
    global model that both sides have; the reader of `decode` sees plain tensors.
    """

    @abstractmethod
    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        """Write the payload, published whole or not at all; return its sha256."""

    @abstractmethod
    def decode(self, path: Path, base: Tensors | None = None) -> Tensors:
        """Return the tensors of a payload, loaded lazily; BadPayload if it is malformed."""


class FullWeights(Codec):
    """Every tensor as it is, in a safetensors file; needs no base."""

    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        """Write a safetensors file."""
        layout = aligned(tensors.layout)
        return write_safetensors(target, ((n, tensors.raw(n)) for n in layout), layout)

    def decode(self, path: Path, base: Tensors | None = None) -> TensorFile:
        """Map a safetensors file."""
        return TensorFile(path)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in small pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, NDArray[Any]]],
    layout: Layout | None = None,
    metadata: Mapping[str, str] = FORMAT,
) -> str:
    """Write tensors as they come; return the file's sha256.

    The file appears whole or not at all.

    Parameters
    ----------
    path : Path
    tensors : iterable of (str, NDArray)
        In the order of `layout`; the stored bits (uint16 for ``BF16``).
    layout : Layout or None
        None: found out while writing, see `write_stream`.
    metadata : mapping of str to str

    Raises
    ------
    ValueError
        If the tensors are not those of the layout, or its order would leave one misaligned
        (see `aligned`).
    """
    if layout is None:
        write_stream(path, tensors, metadata)
        return sha256_of(path)
    header = _header(layout, metadata)
    digest = hashlib.sha256(header)
    expected = iter(layout.items())
    with draft(path) as temporary, open(temporary, "wb") as f:
        f.write(header)
        for name, array in tensors:
            wanted, spec = next(expected, ("no further tensor", TensorInfo("", ())))
            if name != wanted or (array.dtype, array.shape) != (spec.stored, spec.shape):
                found = f"'{name}' {array.dtype} {array.shape}"
                raise ValueError(f"{path}: found {found}, expected '{wanted}' {spec}")
            data = _bytes(array)
            f.write(data)
            digest.update(data)
        if rest := next(expected, None):
            raise ValueError(f"{path}: tensor '{rest[0]}' is missing")
    return digest.hexdigest()


def write_stream(
    path: Path, tensors: Iterable[tuple[str, NDArray[Any]]], metadata: Mapping[str, str] = FORMAT
) -> None:
    """Write tensors whose names and shapes are not known beforehand.

    A safetensors file begins with its table of contents, so the numbers go to a second file
    first; it costs the disk twice the writing, and the memory nothing.
    """
    layout: dict[str, TensorInfo] = {}
    starts: dict[str, int] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(path) as body_path, open(body_path, "w+b") as body:
        for name, array in tensors:
            if name in layout:
                raise ValueError(f"{path}: tensor '{name}' comes twice")
            layout[name], starts[name] = TensorInfo.of(array), body.tell()
            body.write(_bytes(array))
        ordered = aligned(layout)
        with draft(path) as temporary, open(temporary, "wb") as f:
            f.write(_header(ordered, metadata))
            for name, spec in ordered.items():
                body.seek(starts[name])
                _copy(body, f, spec.nbytes)


def aligned(layout: Layout) -> dict[str, TensorInfo]:
    """Order a layout by falling item size, so that every tensor starts aligned."""
    return dict(sorted(layout.items(), key=lambda item: -item[1].stored.itemsize))


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: IO[bytes], target: IO[bytes], count: int) -> None:
    while count > 0:
        piece = source.read(min(count, PIECE))
        if not piece:
            raise EOFError("a file of ours became shorter while it was read")
        target.write(piece)
        count -= len(piece)


def _bytes(array: NDArray[Any]) -> memoryview:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def _header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in layout.items():
        if offset % spec.stored.itemsize:
            raise ValueError(f"tensor '{name}' would be misaligned; order the layout")
        end = offset + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
