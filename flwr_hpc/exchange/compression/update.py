"""Codecs that send an update in fewer bytes: what changed against a version both sides have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.tensorfile import (
    PIECE,
    Numbers,
    TensorFile,
    aligned,
    file_size_range,
    save,
    write_safetensors,
)
from flwr_hpc.exchange.tensors import FLOATS, HALVES, BadPayload, Layout, TensorInfo, Tensors

Values = NDArray[np.float32]
Packed = NDArray[np.uint8]


class UpdateCodec(Codec):
    """Packs every float tensor's update into bytes whose number follows from the tensor's size.

    The payload is a safetensors file: packed tensors are U8 under their names; integers, and what
    the base lacks, are as they are. Without a base all are.

    Parameters
    ----------
    values : UpdateCodec or None
        Packs what this one has left of the values; only for codecs that are `selective`.
    """

    relative = True
    dtypes = ("F32",)  # of what half precisions become
    selective: ClassVar[bool] = False  # Leaves values out; another codec may pack the others

    def __init__(self, values: UpdateCodec | None = None) -> None:
        self.values = values

    # ---- what a codec is --------------------------------------------------------------------

    @abstractmethod
    def sections(self, count: int) -> tuple[int, ...]:
        """Return how many bytes so many values become: of each array that `pack` puts together."""

    @abstractmethod
    def pack(self, values: Values) -> Packed:
        """Return the bytes of float32 values of one dimension, all finite."""

    @abstractmethod
    def unpack(self, packed: Packed, count: int) -> Values:
        """Undo `pack`; BadPayload if it cannot have written these bytes.

        `packed` has the right size; scales that are not finite show in the values.
        """

    @property
    def period(self) -> int:
        """Values that are packed without a look at others begin at its multiples; 0: none are.

        Each section is then that of the first values and what others add to it.
        """
        return 0

    def packed_size(self, count: int) -> int:
        """Return how many bytes so many values become."""
        return sum(self.sections(count))

    def cut(self, packed: Packed, count: int, start: int, stop: int) -> Packed:
        """Return of the bytes of `count` values those of a range, as if that were all of them.

        It begins at a multiple of `period`, and ends at one or with the last value.
        """
        parts, at = [], 0
        ends = (self.sections(number) for number in (start, stop, count))
        for first, last, size in zip(*ends, strict=True):
            parts.append(packed[at + first : at + last])
            at += size
        return np.concatenate(parts)

    # ---- Codec ------------------------------------------------------------------------------

    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        if base is None:
            return save(tensors, target)
        layout = aligned(self._payload_layout(tensors.layout, base.layout))
        return write_safetensors(
            target, ((name, self._encoded(name, tensors, base)) for name in layout), layout
        )

    def decode(
        self, path: Path, base: Tensors | None = None, layout: Layout | None = None
    ) -> Tensors:
        payload = TensorFile(path, layout=layout)
        return payload if base is None else Updated(self, payload, base, layout or base.layout)

    def is_plain(self, relative: bool) -> bool:
        return not relative

    def size_range(self, layout: Layout, accept: Collection[str] = ()) -> tuple[int, int]:
        low, high = file_size_range(layout, accept)
        packed = self._payload_layout(layout, layout).values()
        return min(low, 8 + sum(info.nbytes for info in packed)), high

    def _payload_layout(self, layout: Layout, base: Layout) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo("U8", (self.packed_size(info.size),))
            if is_packed(name, info, base)
            else info
            for name, info in layout.items()
        }

    def _encoded(self, name: str, tensors: Tensors, base: Tensors) -> Numbers:
        if not is_packed(name, tensors.layout[name], base.layout):
            return tensors.raw(name)
        return _Update(self, name, tensors, base)


class _Update:
    """A tensor's update, packed some at a time."""

    dtype = np.dtype(np.uint8)

    def __init__(self, codec: UpdateCodec, name: str, tensors: Tensors, base: Tensors) -> None:
        self._codec, self._size = codec, tensors.layout[name].size
        self._readers = tensors.reader(name), base.reader(name)
        self.shape = (codec.packed_size(self._size),)

    def __iter__(self) -> Iterator[Packed]:
        """Yield the first section as it is made, and then the others, which wait for it."""
        period = self._codec.period
        piece = period * -(-PIECE // period) if period else self._size
        waiting = []
        for start in range(0, self._size, piece):
            part = slice(start, min(start + piece, self._size))
            new, old = (read(part) for read in self._readers)
            update = new.astype(np.float32, copy=False) - old
            packed = self._codec.pack(np.ascontiguousarray(update, np.float32))
            ends = np.cumsum(self._codec.sections(update.size))
            first, *others = np.split(packed, ends[:-1])
            yield first
            waiting.append(others)
        for section in zip(*waiting, strict=True):
            yield from section


class Updated(Tensors):
    """A base and the updates of a payload, added tensor by tensor.

    BadPayload if the payload is not of the layout that these two imply.
    """

    def __init__(
        self, codec: UpdateCodec, payload: TensorFile, base: Tensors, layout: Layout
    ) -> None:
        self._codec, self._payload, self._base = codec, payload, base
        expected = codec._payload_layout(layout, base.layout)
        self._packed = {n for n, info in expected.items() if info is not layout[n]}
        wrong = {n for n in expected if n in self._packed and payload.layout.get(n) != expected[n]}
        if wrong or payload.layout.keys() != expected.keys():
            names = sorted(wrong or payload.layout.keys() ^ expected.keys())
            raise BadPayload(f"not an update of the model: {names[0]!r} is missing or misshapen")
        self.layout = {
            n: TensorInfo(_decoded_dtype(layout[n]), layout[n].shape)
            if n in self._packed
            else payload.layout[n]
            for n in expected
        }

    def raw(self, name: str) -> NDArray[Any]:
        """Return the base's values, and the update added to them."""
        if name not in self._packed:
            return self._payload.raw(name)
        info = self.layout[name]
        update = self._codec.unpack(self._payload.raw(name), info.size).reshape(info.shape)
        return _moved(self._base.tensor(name), update, info)

    def reader(self, name: str) -> Callable[[slice], NDArray[Any]]:
        """Return what unpacks ranges of a tensor, where the codec can."""
        period, info = self._codec.period, self.layout[name]
        if name not in self._packed or not period:
            return super().reader(name)
        packed, base = self._payload.raw(name), self._base.reader(name)

        def read(part: slice) -> NDArray[Any]:
            start, stop, _ = part.indices(info.size)
            if stop <= start:
                return np.empty(0, info.stored)
            low, high = start - start % period, min(stop + -stop % period, info.size)
            found = self._codec.cut(packed, info.size, low, high)
            update = self._codec.unpack(found, high - low)[start - low : stop - low]
            return _moved(base(slice(start, stop)), update, info)

        return read

    def let_go(self) -> None:
        """Keep the payload closed; the base is another's."""
        self._payload.let_go()


def _moved(base: NDArray[Any], update: Values, info: TensorInfo) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):  # the check of the values finds it
        return (base + update).astype(info.stored, copy=False)


def is_packed(name: str, info: TensorInfo, base: Layout) -> bool:
    """Whether a tensor is sent as an update."""
    known = base.get(name)
    same = known is not None and known.shape == info.shape
    return same and info.dtype in FLOATS and info.size > 0


def _decoded_dtype(info: TensorInfo) -> str:
    return "F32" if info.dtype in HALVES else info.dtype


# ---- blocks of values ---------------------------------------------------------------------------


def in_blocks(values: Values, block: int) -> Values:
    """Return values as rows of a block each, the last one filled up with zeros."""
    rows = -(-values.size // block)
    if rows * block == values.size:
        return values.reshape(rows, block)
    padded = np.zeros(rows * block, np.float32)
    padded[: values.size] = values
    return padded.reshape(rows, block)


def joined(*parts: NDArray[Any]) -> Packed:
    """Return the bytes of arrays one after the other, little-endian."""
    little = (np.ascontiguousarray(p, p.dtype.newbyteorder("<")).reshape(-1) for p in parts)
    return np.concatenate([p.view(np.uint8) for p in little])


def split(packed: Packed, *parts: tuple[str, int]) -> list[NDArray[Any]]:
    """Undo `joined`, given dtype and count of each array; the last may be what is left."""
    arrays, start = [], 0
    for dtype, count in parts:
        stop = start + np.dtype(dtype).itemsize * count
        arrays.append(np.frombuffer(packed[start:stop].tobytes(), np.dtype(dtype)))
        start = stop
    return arrays
