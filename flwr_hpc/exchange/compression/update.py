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
    max_header,
    save,
    write_safetensors,
)
from flwr_hpc.exchange.tensors import FLOATS, HALVES, BadPayload, Layout, TensorInfo, Tensors

Values = NDArray[np.float32]
Packed = NDArray[np.uint8]
Section = tuple[str, int]  # dtype and count of numbers that lie together


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
    def sections(self, count: int) -> tuple[Section, ...]:
        """Return what so many values become: the arrays that `pack` puts together."""

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
        return sum(map(section_bytes, self.sections(count)))

    def cut(self, packed: Packed, count: int, start: int, stop: int) -> Packed:
        """Return of the bytes of `count` values those of a range, as if that were all of them.

        It begins at a multiple of `period`, and ends at one or with the last value.
        """
        parts, at = [], 0
        ends = (map(section_bytes, self.sections(number)) for number in (start, stop, count))
        for first, last, size in zip(*ends, strict=True):
            parts.append(packed[at + first : at + last])
            at += size
        return np.concatenate(parts)

    # ---- how packed values lie in a payload: section after section of the whole tensor --------

    def written(self, read: Callable[[slice], Values], count: int) -> Iterator[Packed]:
        """Yield the bytes of `count` values that are read some at a time.

        The first section comes as it is made; the others wait for its end.
        """
        period = self.period
        piece = period * -(-PIECE // period) if period else count
        waiting = []
        for start in range(0, count, piece):
            values = read(slice(start, min(start + piece, count)))
            ends = np.cumsum([section_bytes(section) for section in self.sections(values.size)])
            first, *others = np.split(self.pack(values), ends[:-1])
            yield first
            waiting.append(others)
        for section in zip(*waiting, strict=True):
            yield from section

    def written_size(self, count: int) -> tuple[int, int]:
        """Return how many bytes that are, at least and at most."""
        return self.packed_size(count), self.packed_size(count)

    def reader(self, written: Packed, count: int) -> Callable[[int, int], Values]:
        """Return what unpacks a range of them, from the first to before the second number."""
        period = self.period
        if not period:
            values = self.unpack(written, count)
            return lambda start, stop: values[start:stop]

        def read(start: int, stop: int) -> Values:
            low, high = start - start % period, min(stop + -stop % period, count)
            found = self.cut(written, count, low, high)
            return self.unpack(found, high - low)[start - low : stop - low]

        return read

    # ---- Codec ------------------------------------------------------------------------------

    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        if base is None:
            return save(tensors, target)
        layout = {
            name: TensorInfo("U8", (self.packed_size(info.size),))
            if is_packed(name, info, base.layout)
            else info
            for name, info in tensors.layout.items()
        }
        numbers = ((name, self._numbers(name, tensors, base)) for name in aligned(layout))
        return write_safetensors(target, numbers, aligned(layout))

    def decode(
        self, path: Path, base: Tensors | None = None, layout: Layout | None = None
    ) -> Tensors:
        payload = TensorFile(path, layout=layout)
        return payload if base is None else Updated(self, payload, base, layout or base.layout)

    def is_plain(self, relative: bool) -> bool:
        return not relative

    def size_range(self, layout: Layout, accept: Collection[str] = ()) -> tuple[int, int]:
        sizes = [
            self.written_size(info.size) if is_packed(name, info, layout) else (info.nbytes,) * 2
            for name, info in layout.items()
        ]
        least, most = (8 + sum(size) for size in zip((0, max_header(layout)), *sizes, strict=True))
        low, high = file_size_range(layout, accept)  # without a base
        return min(low, least), max(high, most)

    def _numbers(self, name: str, tensors: Tensors, base: Tensors) -> Numbers:
        if not is_packed(name, tensors.layout[name], base.layout):
            return tensors.raw(name)
        return PackedUpdate(self, name, tensors, base)


class PackedUpdate:
    """A tensor's update, packed some at a time."""

    dtype = np.dtype(np.uint8)

    def __init__(self, codec: UpdateCodec, name: str, tensors: Tensors, base: Tensors) -> None:
        self._codec, self._size = codec, tensors.layout[name].size
        self._readers = tensors.reader(name), base.reader(name)
        self.shape = (codec.packed_size(self._size),)

    def __iter__(self) -> Iterator[Packed]:
        return self._codec.written(self._read, self._size)

    def _read(self, part: slice) -> Values:
        new, old = (read(part) for read in self._readers)
        return np.ascontiguousarray(new.astype(np.float32, copy=False) - old, np.float32)


class Updated(Tensors):
    """A base and the updates of a payload, added tensor by tensor.

    BadPayload if the payload is not of the layout that these two imply.
    """

    def __init__(
        self, codec: UpdateCodec, payload: TensorFile, base: Tensors, layout: Layout
    ) -> None:
        self._codec, self._payload, self._base = codec, payload, base
        self._packed = {n for n, info in layout.items() if is_packed(n, info, base.layout)}
        wrong = {n for n in self._packed if not self._is_written(n, layout[n].size)}
        if wrong or payload.layout.keys() != layout.keys():
            names = sorted(wrong or payload.layout.keys() ^ layout.keys())
            raise BadPayload(f"not an update of the model: {names[0]!r} is missing or misshapen")
        self.layout = {
            n: TensorInfo(_decoded_dtype(info), info.shape)
            if n in self._packed
            else payload.layout[n]
            for n, info in layout.items()
        }

    def raw(self, name: str) -> NDArray[Any]:
        """Return the base's values, and the update added to them."""
        if name not in self._packed:
            return self._payload.raw(name)
        info = self.layout[name]
        update = self._codec.reader(self._payload.raw(name), info.size)(0, info.size)
        return _moved(self._base.tensor(name), update.reshape(info.shape), info)

    def reader(self, name: str) -> Callable[[slice], NDArray[Any]]:
        """Return what unpacks ranges of a tensor, where the codec can."""
        if name not in self._packed:
            return super().reader(name)
        info, base = self.layout[name], self._base.reader(name)
        update = self._codec.reader(self._payload.raw(name), info.size)

        def read(part: slice) -> NDArray[Any]:
            start, stop, _ = part.indices(info.size)
            if stop <= start:
                return np.empty(0, info.stored)
            return _moved(base(slice(start, stop)), update(start, stop), info)

        return read

    def let_go(self) -> None:
        """Keep the payload closed; the base is another's."""
        self._payload.let_go()

    def _is_written(self, name: str, count: int) -> bool:
        found, (low, high) = self._payload.layout.get(name), self._codec.written_size(count)
        if found is None or found.dtype != "U8" or len(found.shape) != 1:
            return False
        return low <= found.size <= high


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


def section_bytes(section: Section) -> int:
    """Return how many bytes an array takes."""
    return np.dtype(section[0]).itemsize * section[1]


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


def split(packed: Packed, *sections: Section) -> list[NDArray[Any]]:
    """Undo `joined`."""
    arrays, start = [], 0
    for dtype, count in sections:
        stop = start + section_bytes((dtype, count))
        arrays.append(np.frombuffer(packed[start:stop].tobytes(), np.dtype(dtype)))
        start = stop
    return arrays
