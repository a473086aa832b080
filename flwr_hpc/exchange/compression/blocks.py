"""Updates as integers of a few bits, in blocks of values that share a scale."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from flwr_hpc.exchange.compression.update import (
    Packed,
    Section,
    UpdateCodec,
    Values,
    in_blocks,
    joined,
    split,
)


class BlockCodec(UpdateCodec):
    """Symmetric: the value of the largest size in a block becomes the largest integer."""

    bits: ClassVar[int]  # Of a value: a divisor of 8
    block: ClassVar[int]  # Values that share a scale: whole bytes

    @property
    def period(self) -> int:
        return self.block

    def sections(self, count: int) -> tuple[Section, ...]:
        return ("<f4", -(-count // self.block)), ("u1", -(-count * self.bits // 8))

    def pack(self, values: Values) -> Packed:
        levels = 2 ** (self.bits - 1) - 1  # on either side of 0
        rows = in_blocks(values, self.block)
        scales = np.abs(rows).max(axis=1) / np.float32(levels)
        steps = np.where(scales > 0, scales, np.float32(1))[:, None]
        codes = (np.rint(rows / steps) + levels).astype(np.uint8).reshape(-1)
        return joined(scales, pack_bits(codes, self.bits, values.size))

    def unpack(self, packed: Packed, count: int) -> Values:
        levels = 2 ** (self.bits - 1) - 1
        scales, rest = split(packed, *self.sections(count))
        codes = (unpack_bits(rest, self.bits, count) - np.uint8(levels)).view(np.int8)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            values: Values = codes * np.repeat(scales, self.block)[:count]
        return values


def pack_bits(codes: Packed, bits: int, count: int) -> Packed:
    """Return the first `count` codes, several in a byte; what fills up the last one is there."""
    each = 8 // bits
    codes = codes[: each * -(-count // each)]
    packed = codes[0::each].copy()
    for i in range(1, each):
        packed |= codes[i::each] << i * bits
    return packed


def unpack_bits(packed: Packed, bits: int, count: int) -> Packed:
    """Undo `pack_bits`."""
    codes = [packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    return np.stack(codes, axis=1).reshape(-1)[:count]
