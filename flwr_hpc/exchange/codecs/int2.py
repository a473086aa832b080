"""Updates in 2 bits, a sign and one of two sizes: made for what top-k selects."""

from __future__ import annotations

import numpy as np

from flwr_hpc.exchange.compression.blocks import pack_bits, unpack_bits
from flwr_hpc.exchange.compression.update import (
    Packed,
    Section,
    UpdateCodec,
    Values,
    in_blocks,
    joined,
    split,
)

BLOCK = 64  # values that share two sizes: those that top-k takes of one of its blocks


class Int2(UpdateCodec):
    """Two sizes for each block of 64: the mean of those above their mean, and of the rest."""

    tolerance = 0.6

    def sections(self, count: int) -> tuple[Section, ...]:
        return ("<f4", 2 * -(-count // BLOCK)), ("u1", -(-count // 4))

    @property
    def period(self) -> int:
        return BLOCK

    def pack(self, values: Values) -> Packed:
        rows = in_blocks(values, BLOCK)
        sizes, there = np.abs(rows), np.ones(rows.shape, np.float32)
        there.reshape(-1)[values.size :] = 0  # what fills up the last block does not count
        mean = (sizes * there).sum(1) / there.sum(1)
        large = sizes > mean[:, None]
        means = [_mean(sizes, there * group) for group in (~large, large)]
        codes = (rows < 0) + 2 * large.astype(np.uint8)
        codes = codes.astype(np.uint8).reshape(-1)
        return joined(np.stack(means, axis=1), pack_bits(codes, 2, values.size))

    def unpack(self, packed: Packed, count: int) -> Values:
        means, bits = split(packed, *self.sections(count))
        codes = unpack_bits(bits, 2, count)
        sizes = means.reshape(-1, 2)[np.arange(count) // BLOCK, codes >> 1]
        values: Values = np.where(codes & 1, -sizes, sizes).astype(np.float32)
        return values


def _mean(sizes: Values, weights: Values) -> Values:
    mean: Values = (sizes * weights).sum(1) / np.maximum(weights.sum(1), np.float32(1))
    return mean
