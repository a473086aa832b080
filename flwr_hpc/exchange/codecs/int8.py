"""Updates in 8-bit integers with a scale per block: a quarter of the bytes."""

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

BLOCK = 1024  # values that share a scale
LEVELS = 127  # on either side of 0


class Int8(UpdateCodec):
    """Symmetric: in each block of 1024 values the one of the largest size becomes +-127."""

    tolerance = 0.02

    def packed_size(self, count: int) -> int:
        return 4 * -(-count // BLOCK) + count

    def pack(self, values: Values) -> Packed:
        rows = in_blocks(values, BLOCK)
        scales = np.abs(rows).max(axis=1) / np.float32(LEVELS)
        steps = np.where(scales > 0, scales, np.float32(1))[:, None]
        codes = np.rint(rows / steps).astype(np.int8)
        return joined(scales, codes.reshape(-1)[: values.size])

    def unpack(self, packed: Packed, count: int) -> Values:
        scales, codes = split(packed, ("<f4", -(-count // BLOCK)), ("i1", count))
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            values: Values = codes * np.repeat(scales, BLOCK)[:count]
        return values
