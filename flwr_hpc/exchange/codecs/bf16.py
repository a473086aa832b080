"""Updates in bfloat16: a half of the bytes."""

from __future__ import annotations

import numpy as np

from flwr_hpc.exchange.compression.update import Packed, Section, UpdateCodec, Values, joined, split


class BFloat16(UpdateCodec):
    """The upper half of every float32, rounded to nearest, ties to even."""

    tolerance = 2**-8

    def sections(self, count: int) -> tuple[Section, ...]:
        return (("<u2", count),)

    @property
    def period(self) -> int:
        return 1

    def pack(self, values: Values) -> Packed:
        bits = values.view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return joined(((bits + half) >> np.uint32(16)).astype(np.uint16))

    def unpack(self, packed: Packed, count: int) -> Values:
        (bits,) = split(packed, *self.sections(count))
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
