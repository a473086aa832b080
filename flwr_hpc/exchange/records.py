"""Flower records whose arrays are loaded when asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from numpy.typing import NDArray

from flwr_hpc.exchange.tensors import BadPayload, TensorInfo, Tensors

NUMPY = "numpy.ndarray"  # Flower's own serialization type
RAW = "safetensors"  # ours, for what numpy lacks: the bits of one tensor
NUMPY_HEADER = 10_240  # bytes, more than numpy reads of one


class LazyArray(Array):
    """A Flower array backed by one tensor of a `Tensors`; immutable.

    ``numpy()`` loads it and ``data`` serializes it anew each time; nothing is kept.
    """

    def __init__(self, source: Tensors, name: str) -> None:
        info = source.layout[name]
        self.source = source
        self.name = name
        self.dtype = str(info.widened)
        self.shape = info.shape
        self.stype = NUMPY

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in numpy's own format, as a plain `Array` would hold it."""
        return self._plain().data

    def numpy(self) -> NDArray[Any]:
        """Return the values; half precisions as float32."""
        return self.source.tensor(self.name)

    def reader(self) -> Callable[[slice], NDArray[Any]]:
        """Return what reads ranges of the values, so that nobody has to have all of them."""
        return self.source.reader(self.name)

    def slice_array(self) -> list[tuple[str, Any]]:
        """Cut ``data`` into chunks, without Flower's cache of them."""
        return self._plain().slice_array()

    def deflate(self) -> bytes:
        """Serialize as a plain `Array`, which is what the receiver knows."""
        return self._plain().deflate()

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyArray:
        return self

    def __repr__(self) -> str:
        return f"LazyArray({self.name!r}, dtype={self.dtype}, shape={self.shape})"

    def _plain(self) -> Array:
        return Array(np.asarray(self.numpy()))


class RecordTensors(Tensors):
    """The arrays of an `ArrayRecord` as they would lie in a file.

    Raises
    ------
    BadPayload
        If an array has a dtype or a serialization that a safetensors file has no place for,
        or does not hold what it says.
    """

    def __init__(self, record: ArrayRecord) -> None:
        self._record = record
        self.layout = {name: _info(name, array) for name, array in record.items()}

    def reader(self, name: str) -> Callable[[slice], NDArray[Any]]:
        """Return what reads ranges of one array's values."""
        array = self._record[name]
        return array.reader() if isinstance(array, LazyArray) else super().reader(name)

    def raw(self, name: str) -> NDArray[Any]:
        """Return the bits of one array."""
        array, info = self._record[name], self.layout[name]
        if isinstance(array, LazyArray):
            return array.source.raw(array.name)
        if len(array.data) > info.nbytes + NUMPY_HEADER:
            raise BadPayload(f"tensor '{name}' has {len(array.data)} bytes, expected {info.nbytes}")
        try:
            if array.stype == RAW:
                bits = np.frombuffer(array.data, info.stored).reshape(info.shape)
            else:
                bits = _read_npy(array.data, info)
        except Exception as exc:  # whatever numpy says to bytes from another site
            raise BadPayload(f"tensor '{name}' cannot be read: {exc}") from None
        if bits.shape != info.shape or bits.dtype.newbyteorder("<") != info.stored:
            raise BadPayload(f"tensor '{name}' is {bits.dtype} {bits.shape}, expected {info}")
        return bits


def _read_npy(data: bytes, info: TensorInfo) -> NDArray[Any]:
    """Read an array in numpy's format; numpy would first make room for all that it claims."""
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if shape != info.shape or dtype.newbyteorder("<") != info.stored:
        raise BadPayload(f"it claims to be {dtype} {shape}")
    values = np.frombuffer(data, dtype, info.size, stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def _info(name: str, array: Array) -> TensorInfo:
    if isinstance(array, LazyArray):
        return array.source.layout[array.name]
    shape = tuple(array.shape)
    if array.stype == RAW and array.dtype == "bfloat16":
        return TensorInfo("BF16", shape)
    try:
        if array.stype != NUMPY:
            raise BadPayload(f"unknown serialization '{array.stype}'")
        return TensorInfo(TensorInfo.of(np.empty(0, np.dtype(array.dtype))).dtype, shape)
    except (TypeError, BadPayload) as exc:
        raise BadPayload(f"tensor '{name}': {exc}") from None


def lazy_record(source: Tensors, names: Iterable[str] | None = None) -> ArrayRecord:
    """Return a record whose arrays are loaded from `source` when asked for.

    `names` gives their order, which matters to who numbers arrays; default: as in the file.
    """
    record = ArrayRecord()  # its other constructors would read every array
    for name in source.layout if names is None else names:
        record[name] = LazyArray(source, name)
    return record


def source_of(record: ArrayRecord) -> Tensors | None:
    """Return what a lazy record stands for, if it stands for the whole of it and no more."""
    first = next(iter(record.values()), None)
    if not isinstance(first, LazyArray) or record.keys() != first.source.layout.keys():
        return None
    same = all(
        isinstance(a, LazyArray) and a.source is first.source and a.name == n
        for n, a in record.items()
    )
    return first.source if same else None


def tensors(record: ArrayRecord) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield names and values one at a time."""
    return ((name, array.numpy()) for name, array in record.items())


def inline(source: Tensors) -> ArrayRecord:
    """Return a record that holds the bytes themselves, for small payloads.

    bfloat16 travels as its bits with a tag of ours (`RecordTensors` reads it), the rest as
    Flower does it.
    """
    record = ArrayRecord()
    for name, info in source.layout.items():
        bits = source.raw(name)
        if info.dtype == "BF16":
            record[name] = Array("bfloat16", info.shape, RAW, bits.tobytes())
        else:
            record[name] = Array(np.asarray(bits))
    return record
