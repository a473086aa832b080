"""Payloads of a codec, and what a hostile site makes of them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flwr_hpc.exchange.codec import Codec

# Where in the sections of a packed tensor the numbers lie that have to be finite, and as what;
# where positions, that have to rise and lie within their block. A new codec has a row.
FINITE = {
    "bf16": (0, "<u2"),
    "int2": (0, "<f4"),
    "int4": (0, "<f4"),
    "int8": (0, "<f4"),
    "topk": (1, "<f4"),
    "topk,int2": (1, "<f4"),
    "topk,int8": (1, "<f4"),
}
POSITIONS = {"topk": 0, "topk,int2": 0, "topk,int8": 0}
WRONG = {
    "<f4": [np.nan, np.inf, -np.inf, 3e38, -3e38],
    "<u2": [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F7F],  # likewise, in bfloat16
}


@dataclass
class Payload:
    """A codec's payload of an update, taken apart."""

    stages: str
    codec: Codec
    header: dict
    body: bytearray
    sizes: dict[str, int]  # Values of each tensor that is packed

    @classmethod
    def of(cls, stages: str, codec: Codec, data: bytes, sizes: dict[str, int]) -> Payload:
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

    def section(self, name: str, number: int) -> slice:
        """Return where a section of a packed tensor lies in the body."""
        start = self.header[name]["data_offsets"][0]
        sizes = self.codec.sections(self.sizes[name])
        return slice(start + sum(sizes[:number]), start + sum(sizes[: number + 1]))


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
    more = 1 << rng.randrange(13)
    start, end = p.header[name]["data_offsets"]
    p.body[end:end] = bytes(more)
    for entry in p.header.values():
        entry["data_offsets"] = [at + more * (at >= end) for at in entry["data_offsets"]]
    p.header[name] |= {"shape": [end - start + more], "data_offsets": [start, end + more]}
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
    where = p.section(name := rng.choice(list(p.sizes)), number)
    values = np.frombuffer(bytes(p.body[where]), dtype).copy()
    pair = 2 if p.stages.endswith("int2") else 1  # of its two sizes one may be in no use
    at = rng.randrange(len(values) // pair) * pair
    values[at : at + pair] = rng.choice(WRONG[dtype])
    assert name in p.header
    p.body[where] = values.tobytes()
    return p.bytes()


def positions(p: Payload, rng: random.Random) -> bytes:
    """Twice the same, falling, or beyond the block or the tensor."""
    where = p.section(rng.choice([n for n in p.sizes if p.sizes[n] > 128]), POSITIONS[p.stages])
    found = np.frombuffer(bytes(p.body[where]), "<u2").copy()
    at = rng.randrange(1, 64)
    match rng.randrange(3):
        case 0:
            found[at] = found[at - 1]
        case 1:
            found[[at - 1, at]] = found[[at, at - 1]]
        case _:
            found[63] = rng.choice([4096, 5000, 65535])
    p.body[where] = found.tobytes()
    return p.bytes()


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
PERHAPS: list[Attack] = [bit_flipped, noise]  # Refused, or an update like any other
