"""Named tensors that are loaded when asked for, and what must hold before they touch a model.

Nothing here holds more than one tensor in memory. No torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

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
HALVES = ("F16", "BF16")
CHUNK = 1 << 18  # numbers looked at, at a time
LOOK = 32 * CHUNK  # bytes that it takes, where a codec has to decode them


_ANY_TIME = nullcontext()


class BadPayload(ValueError):
    """A payload that must not touch the model; the message says why."""


class Shaped(Protocol):
    """An array, or what becomes one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its numbers."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype (safetensors' name) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: Shaped) -> TensorInfo:
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
        return np.dtype(np.float32) if self.dtype in HALVES else self.stored

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
        return widen(self.raw(name), self.layout[name].dtype)

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return a range of the first dimension, as stored; a tensor without one is whole."""
        bits = self.raw(name)
        return bits[start:stop] if bits.ndim else bits

    def reader(self, name: str) -> Callable[[slice], NDArray[Any]]:
        """Return what reads ranges of a tensor's values, in the order of the file."""
        bits, dtype = self.raw(name).reshape(-1), self.layout[name].dtype
        return lambda part: widen(bits[part], dtype)

    def let_go(self) -> None:  # noqa: B027 - most have none
        """Keep no file open between two reads: whoever calls this sees to it that none goes."""

    @property
    def nbytes(self) -> int:
        """How many bytes all tensors take as stored."""
        return sum(info.nbytes for info in self.layout.values())


def check(
    tensors: Tensors,
    layout: Layout | None = None,
    accept: Collection[str] = (),
    passed: Callable[[int], object] = lambda count: None,
    turn: AbstractContextManager[object] = _ANY_TIME,
) -> None:
    """Refuse tensors that must not touch the model.

    Parameters
    ----------
    tensors : Tensors
    layout : Layout or None
        The model's. None: only that all numbers are finite.
    accept : collection of str
        Dtypes that may stand for a float of the model, besides its own.
    passed : callable
        ``passed(count)``: told how many bytes have been looked at, some at a time.
    turn : context manager
        Entered for each look, which takes `LOOK` bytes.

    Raises
    ------
    BadPayload
        Naming the first tensor that is wrong and what is wrong with it.
    """
    if layout is not None:
        check_layout(tensors.layout, layout, accept)
    for name, info in tensors.layout.items():
        read = tensors.reader(name)
        model = info if layout is None else layout[name]
        for start in range(0, info.size, CHUNK):
            if info.dtype in FLOATS:
                with turn:
                    _check_range(name, read(slice(start, start + CHUNK)), model)
            passed(min(CHUNK, info.size - start) * info.stored.itemsize)


def check_values(name: str, bits: NDArray[Any], info: TensorInfo, model: TensorInfo) -> None:
    """Refuse one tensor, as stored, whose values the model's dtype cannot calculate with.

    NaN, infinity, what becomes infinite in that dtype, and what becomes so as soon as two such
    values are subtracted and squared: an outer step with one of them would end the run.
    """
    if info.dtype not in FLOATS:
        return
    values = bits.reshape(-1)
    for start in range(0, values.size, CHUNK):
        _check_range(name, widen(values[start : start + CHUNK], info.dtype), model)


def _check_range(name: str, values: NDArray[Any], model: TensorInfo) -> None:
    largest = float(np.sqrt(np.finfo(model.widened).max)) / 4
    with np.errstate(over="ignore", invalid="ignore"):
        cast = _cast(values, model)
        low, high = float(cast.min()), float(cast.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadPayload(f"tensor '{name}' has a value that is not finite in {model.dtype}")
    if max(-low, high) > largest:
        raise BadPayload(
            f"tensor '{name}' has a value of {max(-low, high):.1e}: above {largest:.1e} "
            "the squares of differences are not finite"
        )


def check_layout(found: Layout, expected: Layout, accept: Collection[str] = ()) -> None:
    """Refuse other names, shapes or dtypes; a float may have one of the dtypes in `accept`."""
    for names, what in (
        (expected.keys() - found.keys(), "missing"),
        (found.keys() - expected.keys(), "unknown"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3])[:200] + (", ..." if len(names) > 3 else "")
            raise BadPayload(f"{len(names)} tensors are {what} ({shown})")
    for name, want in expected.items():
        have = found[name]
        if have.shape != want.shape:
            raise BadPayload(f"tensor '{name}' has shape {have.shape}, expected {want.shape}")
        if have.dtype != want.dtype and have.dtype not in _others(want, accept):
            raise BadPayload(f"tensor '{name}' has dtype {have.dtype}, expected {want.dtype}")


def size_range(layout: Layout, accept: Collection[str] = ()) -> tuple[int, int]:
    """Return how many bytes tensors of a layout take, at least and at most."""
    sizes = [
        [info.size * STORED[dtype].itemsize for dtype in (info.dtype, *_others(info, accept))]
        for info in layout.values()
    ]
    return sum(map(min, sizes)), sum(map(max, sizes))


def _others(info: TensorInfo, accept: Collection[str]) -> Collection[str]:
    return accept if info.dtype in FLOATS else ()


def _cast(values: NDArray[Any], model: TensorInfo) -> NDArray[Any]:
    """Return values as the model holds them; float32 has bfloat16's range."""
    return values.astype(model.widened if model.dtype == "BF16" else model.stored, copy=False)


def widen(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return the values of stored bits: half precisions as float32, which is exact."""
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        wide = np.empty(bits.shape, np.uint32)
        np.left_shift(bits, np.uint32(16), out=wide)
        return wide.view(np.float32)
    return bits.astype(np.float32) if dtype == "F16" else bits
