"""Named tensors that are loaded when asked for, and what must hold before they touch a model.

Nothing here holds more than one tensor in memory. No torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        return sum(info.nbytes for info in self.layout.values())


def check(tensors: Tensors, layout: Layout | None = None) -> None:
    """Refuse tensors that must not touch the model.

    Parameters
    ----------
    tensors : Tensors
    layout : Layout or None
        What is expected, see `check_layout`. None: only that all numbers are finite.

    Raises
    ------
    BadPayload
        Naming the first tensor that is wrong and what is wrong with it.
    """
    if layout is not None:
        check_layout(tensors.layout, layout)
    for name, info in tensors.layout.items():
        check_finite(name, tensors.raw(name), info)


def check_finite(name: str, bits: NDArray[Any], info: TensorInfo) -> None:
    """Refuse NaN and infinity in one tensor, as stored."""
    if info.dtype not in FLOATS:
        return
    values = bits.reshape(-1)
    for start in range(0, values.size, CHUNK):
        if not np.isfinite(_widen(values[start : start + CHUNK], info.dtype)).all():
            raise BadPayload(f"tensor '{name}' has a value that is not finite")


def check_layout(found: Layout, expected: Layout) -> None:
    """Refuse other names, shapes or dtypes, except that any float may stand for any other."""
    for names, what in (
        (expected.keys() - found.keys(), "missing"),
        (found.keys() - expected.keys(), "unknown"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise BadPayload(f"{len(names)} tensors are {what} ({shown})")
    for name, want in expected.items():
        have = found[name]
        if have.shape != want.shape:
            raise BadPayload(f"tensor '{name}' has shape {have.shape}, expected {want.shape}")
        both_float = have.dtype in FLOATS and want.dtype in FLOATS
        if have.dtype != want.dtype and not both_float:
            raise BadPayload(f"tensor '{name}' has dtype {have.dtype}, expected {want.dtype}")


def _widen(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        wide = np.empty(bits.shape, np.uint32)
        np.left_shift(bits, np.uint32(16), out=wide)
        return wide.view(np.float32)
    return bits.astype(np.float32) if dtype == "F16" else bits
