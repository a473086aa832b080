"""Updates in 4-bit integers with a scale per block: 13.3 % of the bytes."""

from __future__ import annotations

from flwr_hpc.exchange.compression.blocks import BlockCodec


class Int4(BlockCodec):
    """In each block of 128 values the one of the largest size becomes +-7."""

    bits, block = 4, 128
    tolerance = 0.2
