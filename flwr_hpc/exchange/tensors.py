"""Tensors that are loaded when asked for, and the checks on what other sites sent.

Nothing here holds more than one tensor in memory, and nothing that another site wrote is
trusted: whatever is wrong with a file ends in `BadPayload`. No torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

# How each safetensors dtype lies in the file; numpy has no bfloat16, so its bits are uint16.
STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES = {stored: name for name, stored in STORED.items() if name != "BF16"}
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 32 << 20  # bytes; some 250,000 tensors
CHUNK = 1 << 20  # numbers looked at, at a time


class BadPayload(ValueError):
    """A payload that must not touch the model; the message says why."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (safetensors' name) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: NDArray[Any]) -> TensorInfo:
        """Describe an array; BadPayload if safetensors has no such dtype."""
        name = NAMES.get(array.dtype.newbyteorder("<"))
        if name is None:
            raise BadPayload(f"dtype {array.dtype} has no place in a safetensors file")
        return cls(name, tuple(array.shape))

    @property
    def stored(self) -> np.dtype[Any]:
        """Dtype of the bits in the file."""
        return STORED[self.dtype]

    @property
    def widened(self) -> np.dtype[Any]:
        """Dtype to calculate in: half precisions become float32."""
        return np.dtype(np.float32) if self.dtype in ("F16", "BF16") else self.stored

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes in the file."""
        return self.size * self.stored.itemsize


Layout = Mapping[str, TensorInfo]


class Tensors(ABC):
    """Named tensors that are loaded when asked for."""

    layout: Layout

    @abstractmethod
    def raw(self, name: str) -> NDArray[Any]:
        """Return the bits as stored (uint16 for bfloat16)."""

    def tensor(self, name: str) -> NDArray[Any]:
        """Return the values; float16 and bfloat16 as float32, which is exact."""
        return _widen(self.raw(name), self.layout[name].dtype)

    @property
    def nbytes(self) -> int:
        """How many bytes all tensors take as stored."""
        return sum(spec.nbytes for spec in self.layout.values())


class TensorFile(Tensors):
    """A safetensors file whose tensors are memory-mapped, each by itself.

    A mapping lives as long as the array over it, so pages of tensors that are done with do
    not stay in the process. Arrays are private copies on write. The open file outlives its
    name: deleting it on disk does not harm a reader.

    Parameters
    ----------
    path : Path
    sha256 : str or None
        Of the file, where known; else computed when first asked for.

    Raises
    ------
    BadPayload
        If the file is not a whole, valid safetensors file.
    """

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        self.path = path
        self._sha256 = sha256
        self._file = open(path, "rb")  # noqa: SIM115 - stays open as long as the object lives
        self.layout, self._starts = _read_header(self._file, path)

    @property
    def sha256(self) -> str:
        """Hex digest of the whole file."""
        if self._sha256 is None:
            self._file.seek(0)
            self._sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        return self._sha256

    def raw(self, name: str) -> NDArray[Any]:
        """Map one tensor."""
        spec = self.layout[name]
        if spec.nbytes == 0:
            return np.empty(spec.shape, spec.stored)
        skip = self._starts[name] % mmap.ALLOCATIONGRANULARITY
        view = mmap.mmap(
            self._file.fileno(),
            spec.nbytes + skip,
            access=mmap.ACCESS_COPY,
            offset=self._starts[name] - skip,
        )
        return np.frombuffer(view, spec.stored, spec.size, skip).reshape(spec.shape)


def check(tensors: Tensors, layout: Layout | None = None) -> None:
    """Refuse tensors that must not touch the model.

    Parameters
    ----------
    tensors : Tensors
    layout : Layout or None
        What is expected: the same names and shapes, and the same dtypes, except that any
        float may stand for any other. None: only that all numbers are finite.

    Raises
    ------
    BadPayload
        Naming the first tensor that is wrong and what is wrong with it.
    """
    if layout is not None:
        _check_layout(tensors.layout, layout)
    for name, spec in tensors.layout.items():
        if spec.dtype not in FLOATS:
            continue
        values = tensors.raw(name).reshape(-1)
        for start in range(0, values.size, CHUNK):
            if not np.isfinite(_widen(values[start : start + CHUNK], spec.dtype)).all():
                raise BadPayload(f"tensor '{name}' has a value that is not finite")


def _widen(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        wide = np.empty(bits.shape, np.uint32)
        np.left_shift(bits, np.uint32(16), out=wide)
        return wide.view(np.float32)
    return bits.astype(np.float32) if dtype == "F16" else bits


def _read_header(f: IO[bytes], path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Return layout and absolute offsets; the library judges whether they are valid."""
    length = int.from_bytes(f.read(8), "little")
    if length > MAX_HEADER:
        raise BadPayload(f"{path.name}: the header claims {length} bytes")
    try:
        with safe_open(path, framework="numpy"):
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        layout = {n: TensorInfo(e["dtype"], tuple(e["shape"])) for n, e in header.items()}
    except (SafetensorError, ValueError, RecursionError) as exc:
        raise BadPayload(f"{path.name}: not a valid safetensors file: {exc}") from None
    for name, spec in layout.items():
        if spec.dtype not in STORED:
            raise BadPayload(f"{path.name}: tensor '{name}' has unknown dtype {spec.dtype}")
    starts = {n: 8 + length + int(e["data_offsets"][0]) for n, e in header.items()}
    return layout, starts


def _check_layout(found: Layout, expected: Layout) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise BadPayload(f"{len(missing)} tensors are missing, the first is '{missing[0]}'")
    if extra := sorted(found.keys() - expected.keys()):
        raise BadPayload(f"{len(extra)} tensors are unknown, the first is '{extra[0]}'")
    for name, want in expected.items():
        have = found[name]
        if have.shape != want.shape:
            raise BadPayload(f"tensor '{name}' has shape {have.shape}, expected {want.shape}")
        both_float = have.dtype in FLOATS and want.dtype in FLOATS
        if have.dtype != want.dtype and not both_float:
            raise BadPayload(f"tensor '{name}' has dtype {have.dtype}, expected {want.dtype}")
