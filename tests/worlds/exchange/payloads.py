"""Payloads of a codec, and what a hostile site makes of them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flwr_hpc.exchange.codecs import zstd as zstd_codec
from flwr_hpc.exchange.codecs.zstd import zstd
from flwr_hpc.exchange.compression.update import UpdateCodec, section_bytes

# Where in the sections of a packed tensor the numbers lie that have to be finite, and as what;
# where the steps to positions, that have to lie within their block. A new codec has a row.
FINITE = {
    "bf16": (0, "<u2"),
    "int2": (0, "<f4"),
    "int4": (0, "<f4"),
    "int8": (0, "<f4"),
    "topk": (1, "<f4"),
    "topk,int2": (1, "<f4"),
    "topk,int8": (1, "<f4"),
    "bf16,zstd": (0, "<u2"),
    "int4,zstd": (0, "<f4"),
    "topk,int2,zstd": (1, "<f4"),
}
POSITIONS = {"topk": 0, "topk,int2": 0, "topk,int8": 0, "topk,int2,zstd": 0}
WRONG = {
    "<f4": [np.nan, np.inf, -np.inf, 3e38, -3e38],
    "<u2": [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F7F],  # likewise, in bfloat16
}


@dataclass
class Payload:
    """A codec's payload of an update, taken apart."""

    stages: str
    codec: UpdateCodec
    header: dict
    body: bytearray
    sizes: dict[str, int]  # Values of each tensor that is packed

    @classmethod
    def of(cls, stages: str, codec: UpdateCodec, data: bytes, sizes: dict[str, int]) -> Payload:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        return cls(stages, codec, header, bytearray(data[8 + length :]), sizes)

    def bytes(self) -> bytes:
        text = json.dumps(self.header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + self.body

    def copy(self) -> Payload:
        header = json.loads(json.dumps(self.header))
        return Payload(self.stages, self.codec, header, bytearray(self.body), self.sizes)

    def section(self, name: str, number: int, dtype: str) -> np.ndarray:
        """Return a section of a packed tensor."""
        where = self._where(name, number)
        return np.frombuffer(self._packed(name)[where].tobytes(), dtype).copy()

    def put_section(self, name: str, number: int, values: np.ndarray) -> None:
        """Have a packed tensor hold another section."""
        packed = self._packed(name).copy()
        packed[self._where(name, number)] = values.view(np.uint8)
        if not self.compressed:
            self.put(name, packed.tobytes())
        else:
            planes = zstd_codec._planes(packed, self.codec.sections(self.sizes[name]))
            self.put_planes(name, [zstd_codec._compressed(plane).tobytes() for plane in planes])

    def written(self, name: str) -> bytes:
        """Return the bytes of a packed tensor."""
        return bytes(self.body[slice(*self.header[name]["data_offsets"])])

    def put(self, name: str, data: bytes) -> None:
        """Have a packed tensor be other bytes, of any number: the file stays well-formed."""
        start, end = self.header[name]["data_offsets"]
        self.body[start:end] = data
        more = len(data) - (end - start)
        for entry in self.header.values():
            entry["data_offsets"] = [at + more * (at >= end) for at in entry["data_offsets"]]
        self.header[name] |= {"shape": [len(data)], "data_offsets": [start, start + len(data)]}

    # ---- of one frame, as all tensors here are: its planes, and then how long each is ----------

    @property
    def compressed(self) -> bool:
        return self.stages.endswith("zstd")

    def planes(self, name: str) -> list[bytes]:
        """Return the planes of a tensor as they are written."""
        data, found = self.written(name), []
        lengths = np.frombuffer(data[-4 * len(self.plane_sizes(name)) :], "<u4")
        for length in lengths:
            found.append(data[:length])
            data = data[length:]
        return found

    def plane_sizes(self, name: str) -> list[int]:
        """Return how many bytes each of them is made of."""
        return zstd_codec._sizes(self.codec.sections(self.sizes[name]))

    def put_planes(self, name: str, planes: list[bytes]) -> None:
        """Have a tensor be other planes, and the lengths theirs."""
        lengths = np.array([len(plane) for plane in planes], "<u4")
        self.put(name, b"".join(planes) + lengths.tobytes())

    def _where(self, name: str, number: int) -> slice:
        sizes = [section_bytes(section) for section in self.codec.sections(self.sizes[name])]
        return slice(sum(sizes[:number]), sum(sizes[: number + 1]))

    def _packed(self, name: str) -> np.ndarray:
        """Return a tensor's bytes before they were compressed, if they were."""
        if not self.compressed:
            return np.frombuffer(self.written(name), np.uint8)
        sections = self.codec.sections(self.sizes[name])
        sizes = self.plane_sizes(name)
        planes = [
            zstd_codec._expanded(np.frombuffer(plane, np.uint8), size)
            for plane, size in zip(self.planes(name), sizes, strict=True)
        ]
        return zstd_codec._joined_planes(planes, sections)


Attack = Callable[[Payload, random.Random], bytes]


def truncated(p: Payload, rng: random.Random) -> bytes:
    data = p.bytes()
    return data[: rng.randrange(len(data))]


def prolonged(p: Payload, rng: random.Random) -> bytes:
    return p.bytes() + rng.randbytes(rng.choice([1, 8, 4096]))


def header_longer(p: Payload, rng: random.Random) -> bytes:
    """The length of the header lies by a power of two, up to what 64 bits hold."""
    data = p.bytes()
    length = int.from_bytes(data[:8], "little")
    lie = rng.choice([length + (1 << k) for k in range(63)] + [length >> k for k in range(1, 5)])
    return struct.pack("<Q", lie & (1 << 64) - 1) + data[8:]


def offset_lies(p: Payload, rng: random.Random) -> bytes:
    """A tensor begins or ends elsewhere: outside, within another, before itself."""
    entry = p.header[rng.choice(list(p.header))]
    entry["data_offsets"][rng.randrange(2)] += rng.choice([-1, 1]) << rng.randrange(60)
    return p.bytes()


def shape_lies(p: Payload, rng: random.Random) -> bytes:
    entry = p.header[rng.choice(list(p.header))]
    by = 1 << rng.randrange(60)
    shape = entry["shape"]
    entry["shape"] = rng.choice([[by, *shape], [n + by for n in shape] or [by], [-by]])
    return p.bytes()


def size_agrees_with_its_lie(p: Payload, rng: random.Random) -> bytes:
    """A packed tensor with 2^k bytes more, of which all are there: the file is well-formed."""
    name = rng.choice(list(p.sizes))
    p.put(name, p.written(name) + bytes(1 << rng.randrange(13)))
    return p.bytes()


def another_dtype(p: Payload, rng: random.Random) -> bytes:
    entry = p.header[rng.choice(list(p.sizes))]
    entry["dtype"] = rng.choice(["F32", "BF16", "I64", "BOOL", "F8_E4M3", "", "I8"])
    return p.bytes()


def another_name(p: Payload, rng: random.Random) -> bytes:
    name = rng.choice(list(p.header))
    entry = p.header.pop(name)
    if rng.random() < 0.7:
        p.header[rng.choice([name + "x", "", "__metadata__", "\x00", "w" * 100_000])] = entry
    return p.bytes()


def not_finite(p: Payload, rng: random.Random) -> bytes:
    number, dtype = FINITE[p.stages]
    values = p.section(name := rng.choice(list(p.sizes)), number, dtype)
    pair = 2 if "int2" in p.stages else 1  # of its two sizes one may be in no use
    at = rng.randrange(len(values) // pair) * pair
    values[at : at + pair] = rng.choice(WRONG[dtype])
    p.put_section(name, number, values)
    return p.bytes()


def positions(p: Payload, rng: random.Random) -> bytes:
    """Twice the same, or beyond the block or the tensor."""
    name = rng.choice([n for n in p.sizes if p.sizes[n] > 128])
    found = p.section(name, POSITIONS[p.stages], "<u2")
    at = rng.randrange(1, 64)
    found[at] = rng.choice([0, 4096, 5000, 65535])
    p.put_section(name, POSITIONS[p.stages], found)
    return p.bytes()


def lengths_lie(p: Payload, rng: random.Random) -> bytes:
    """A frame is said to be longer or shorter; of two, so that the sum is right."""
    name = rng.choice([n for n in p.sizes if len(p.planes(n)) > 1])
    count = len(p.planes(name))
    data = bytearray(p.written(name))
    lengths = np.frombuffer(data[-4 * count :], "<u4").astype(np.int64)
    by = 1 << rng.randrange(31)
    one, other = rng.sample(range(count), 2)
    lengths[one] += by
    lengths[other] -= by * rng.randrange(2)
    data[-4 * count :] = lengths.astype("<u4").tobytes()
    p.put(name, bytes(data))
    return p.bytes()


def frame_lies(p: Payload, rng: random.Random) -> bytes:
    """A frame is none, of other content, or more than one, and as long as the table says."""
    name = rng.choice([n for n in p.sizes if max(p.plane_sizes(n)) > 64])
    planes, sizes = p.planes(name), p.plane_sizes(name)
    at = sizes.index(max(sizes))
    size = sizes[at]
    honest = frame(size)
    planes[at] = rng.choice(
        [
            b"",
            honest[: rng.randrange(len(honest))],
            honest + rng.randbytes(rng.randrange(1, 9)),
            honest + honest,
            frame(rng.choice([0, 1, size - 1, size + 1, 2 * size])),
            frame(*[1 << 10] * (size // 9)),  # a hundred times and more of what is right
            frame(size, window=rng.randrange(max(11, size.bit_length() + 1), 42)),
            zstd.compress(bytes(size), zstd_dict=DICTIONARY),
            SKIPPED,
            SKIPPED + honest,
            rng.randbytes(rng.randrange(1, size)),
        ]
    )
    p.put_planes(name, planes)
    return p.bytes()


def frame(*sizes: int, window: int | None = None) -> bytes:
    """Return a Zstandard frame of blocks of zeros, told in 4 bytes each (RFC 8878, 3.1.1).

    Whoever reads it is to make room for 2^window bytes; by default, for the largest block.
    """
    window = window or max(10, (max(sizes) - 1).bit_length())
    blocks = [(size << 3 | 1 << 1).to_bytes(3, "little") + b"\0" for size in sizes]
    last = (int.from_bytes(blocks[-1][:3], "little") | 1).to_bytes(3, "little") + b"\0"
    head = bytes.fromhex("28b52ffd") + bytes([0, (window - 10) << 3])
    return b"".join([head, *blocks[:-1], last])


SKIPPED = bytes.fromhex("502a4d18") + struct.pack("<I", 8) + bytes(8)  # a frame of no content
DICTIONARY = zstd.train_dict([b"%d %d" % (k, k * k) for k in range(2000)], 1000)


def bit_flipped(p: Payload, rng: random.Random) -> bytes:
    data = bytearray(p.bytes())
    for _ in range(rng.choice([1, 1, 3])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def noise(p: Payload, rng: random.Random) -> bytes:
    """Random bytes in the body, where any may be an update."""
    start = rng.randrange(len(p.body))
    some = rng.randbytes(rng.randint(1, 64))[: len(p.body) - start]
    p.body[start : start + len(some)] = some
    return p.bytes()


REFUSED: list[Attack] = [
    truncated, prolonged, header_longer, offset_lies, shape_lies, size_agrees_with_its_lie,
    another_dtype, another_name, not_finite, positions,
]  # fmt: skip
OF_FRAMES: list[Attack] = [lengths_lie, frame_lies]  # Refused too, where there are frames
PERHAPS: list[Attack] = [bit_flipped, noise]  # Refused, or an update like any other
