"""What other stages make of an update, in fewer bytes and exactly: Zstandard (RFC 8878).

A tensor's values are cut into frames that the stages before pack each by itself, so that ranges
are read without the rest. Numbers of several bytes have their first bytes together, their second
ones, and so on: the exponents of bfloat16 repeat where its mantissas do not. Each such plane is a
Zstandard frame, or as it is if that is no larger. After all planes of a tensor come their lengths.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.exchange.compression.update import (
    Packed,
    PackedUpdate,
    Section,
    UpdateCodec,
    Values,
    is_packed,
    joined,
    split,
)
from flwr_hpc.exchange.tensorfile import aligned, save, write_safetensors
from flwr_hpc.exchange.tensors import BadPayload, TensorInfo, Tensors

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LEVEL = 1  # There is next to nothing to find but how often a byte occurs
FRAME = 1 << 17, 1 << 18  # packed bytes, and values, of a frame at most; but a period at least
LENGTH = "<u4"


class Zstd(UpdateCodec):
    """Zstandard over the bytes of other stages.

    Parameters
    ----------
    values : UpdateCodec
        What they are; it has a period.
    """

    lossless = True
    varies = True
    # What it does not pay for, and why; measured: benchmarks/exchange/lossless.py
    refused: ClassVar[dict[str, str]] = {
        "full": "it saves 15.5 % of whole weights, which are then no longer files to be linked "
        "and mapped as they are; bf16 and zstd save 65 % of an update"
    }

    def __init__(self, values: UpdateCodec) -> None:
        super().__init__(values)
        self._inner = values
        self.tolerance = values.tolerance
        period = values.period
        each = min(FRAME[0] // values.packed_size(period), FRAME[1] // period)
        self._frame = max(1, each) * period  # values
        self._planes = len(_sizes(values.sections(period)))  # of a frame

    # ---- what it is made of -------------------------------------------------------------------

    @property
    def period(self) -> int:
        return self._inner.period

    def sections(self, count: int) -> tuple[Section, ...]:
        return self._inner.sections(count)

    def pack(self, values: Values) -> Packed:
        return self._inner.pack(values)

    def unpack(self, packed: Packed, count: int) -> Values:
        return self._inner.unpack(packed, count)

    def payload_gb(self, parameters: int) -> float | None:
        return self._inner.payload_gb(parameters)

    # ---- frames -------------------------------------------------------------------------------

    def written(self, read: Callable[[slice], Values], count: int) -> Iterator[Packed]:
        lengths = []
        for start in range(0, count, self._frame):
            values = read(slice(start, min(start + self._frame, count)))
            for plane in _planes(self._inner.pack(values), self._inner.sections(values.size)):
                written = _compressed(plane)
                lengths.append(written.size)
                yield written
        yield joined(np.array(lengths, LENGTH))

    def written_size(self, count: int) -> tuple[int, int]:
        table = 4 * self._planes * -(-count // self._frame)
        return table, table + self.packed_size(count)

    def reader(self, written: Packed, count: int) -> Callable[[int, int], Values]:
        sizes = self._plane_sizes(count)
        body, table = written[: -4 * sizes.size], written[-4 * sizes.size :]
        lengths = np.frombuffer(table.tobytes(), LENGTH).astype(np.int64)
        if (lengths > sizes).any() or lengths.sum() != body.size:
            raise BadPayload("the lengths of an update's frames are not those of its bytes")
        ends = np.cumsum(lengths)

        def frame(number: int, values: int) -> Packed:
            planes = range(number * self._planes, (number + 1) * self._planes)
            found = [_expanded(body[ends[k] - lengths[k] : ends[k]], sizes[k]) for k in planes]
            return _joined_planes(found, self._inner.sections(values))

        def read(start: int, stop: int) -> Values:
            found = []
            for number in range(start // self._frame, -(-stop // self._frame)):
                first = number * self._frame
                values = min(self._frame, count - first)
                inner = self._inner.reader(frame(number, values), values)
                found.append(inner(max(start - first, 0), min(stop - first, values)))
            return np.concatenate(found)

        return read

    def _plane_sizes(self, count: int) -> NDArray[np.int64]:
        """Return how many bytes each plane of all frames has."""
        whole, rest = divmod(count, self._frame)
        full, last = (_sizes(self._inner.sections(values)) for values in (self._frame, rest))
        return np.array(full * whole + last * (rest > 0), np.int64)

    # ---- Codec --------------------------------------------------------------------------------

    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        """Write a payload; what is packed lies in an unnamed file until all lengths are known."""
        if base is None:
            return save(tensors, target)
        layout, starts = dict(tensors.layout), dict[str, int]()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent) as body:
            for name, info in tensors.layout.items():
                if is_packed(name, info, base.layout):
                    starts[name] = body.tell()
                    for written in PackedUpdate(self, name, tensors, base):
                        body.write(written.data)
                    layout[name] = TensorInfo("U8", (body.tell() - starts[name],))
            body.flush()
            numbers = (
                (
                    name,
                    np.memmap(body, np.uint8, "r", starts[name], info.shape)
                    if name in starts
                    else tensors.raw(name),
                )
                for name, info in aligned(layout).items()
            )
            return write_safetensors(target, numbers, aligned(layout))


def _sizes(sections: tuple[Section, ...]) -> list[int]:
    """Return how many bytes each plane of a frame has."""
    return [count for dtype, count in sections for _ in range(np.dtype(dtype).itemsize)]


def _planes(packed: Packed, sections: tuple[Section, ...]) -> Iterator[Packed]:
    """Yield the first bytes of all numbers of a section, then the second ones, and so on."""
    for numbers in split(packed, *sections):
        bytes_of_each = numbers.view(np.uint8).reshape(-1, numbers.itemsize)
        yield from np.ascontiguousarray(bytes_of_each.T)


def _joined_planes(planes: list[Packed], sections: tuple[Section, ...]) -> Packed:
    """Undo `_planes`."""
    parts, rest = [], iter(planes)
    for dtype, _ in sections:
        numbers = [next(rest) for _ in range(np.dtype(dtype).itemsize)]
        parts.append(np.stack(numbers, axis=1).reshape(-1))
    return np.concatenate(parts)


def _compressed(plane: Packed, level: int = LEVEL) -> Packed:
    found = zstd.compress(plane.data, level)
    return np.frombuffer(found, np.uint8) if len(found) < plane.size else plane


def _expanded(written: Packed, size: int) -> Packed:
    """Undo `_compressed`, with no more memory or time than an honest plane takes."""
    if written.size == size:
        return written
    window = max(10, (int(size) - 1).bit_length())  # 10: the least that there is
    limit: dict[int, int] = {zstd.DecompressionParameter.window_log_max: window}
    decoder = zstd.ZstdDecompressor(options=limit)
    try:
        data = decoder.decompress(written.data, int(size))
    except zstd.ZstdError as exc:
        raise BadPayload(f"a frame of an update cannot be read: {exc}") from None
    if len(data) != size or not decoder.eof or decoder.unused_data:
        raise BadPayload(f"a frame of an update is not one of {size} bytes")
    return np.frombuffer(data, np.uint8)
