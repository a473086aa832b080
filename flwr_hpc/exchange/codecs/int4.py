"""Updates in 4-bit integers with a scale per block: 13.3 % of the bytes."""

from __future__ import annotations

import numpy as np

from flwr_hpc.exchange.compression.update import (
    Packed,
    UpdateCodec,
    Values,
    in_blocks,
    joined,
    split,
)

BLOCK = 128  # values that share a scale
LEVELS = 7  # on either side of 0


class Int4(UpdateCodec):
    """Symmetric: in each block of 128 values the one of the largest size becomes +-7."""

    tolerance = 0.2

    def packed_size(self, count: int) -> int:
        return 4 * -(-count // BLOCK) + -(-count // 2)

    def pack(self, values: Values) -> Packed:
        rows = in_blocks(values, BLOCK)
        scales = np.abs(rows).max(axis=1) / np.float32(LEVELS)
        steps = np.where(scales > 0, scales, np.float32(1))[:, None]
        codes = (np.rint(rows / steps) + LEVELS).astype(np.uint8).reshape(-1)
        codes = codes[: values.size + values.size % 2]  # a block has an even number
        return joined(scales, codes[0::2] | codes[1::2] << 4)

    def unpack(self, packed: Packed, count: int) -> Values:
        scales, pairs = split(packed, ("<f4", -(-count // BLOCK)), ("u1", -(-count // 2)))
        codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:count]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            values: Values = (codes.astype(np.float32) - LEVELS) * np.repeat(scales, BLOCK)[:count]
        return values
