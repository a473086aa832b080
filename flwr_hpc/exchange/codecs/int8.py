"""Updates in 8-bit integers with a scale per block: a quarter of the bytes."""

from __future__ import annotations

from flwr_hpc.exchange.compression.blocks import BlockCodec


class Int8(BlockCodec):
    """In each block of 1024 values the one of the largest size becomes +-127."""

    bits, block = 8, 1024
    tolerance = 0.02
