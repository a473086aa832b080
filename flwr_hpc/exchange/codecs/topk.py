"""The largest 1.6 % of an update's values (SparseLoCo, arXiv:2508.15706).

What is left out is lost unless it is brought along with later updates: ``exchange.feedback``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.exchange.compression.update import Packed, UpdateCodec, Values
from flwr_hpc.exchange.tensors import BadPayload

BLOCK = 4096  # values that are compared with each other; a position in one takes two bytes
KEPT = 64  # of each


class TopK(UpdateCodec):
    """Of each block of 4096 values the 64 largest by size; of a smaller one as large a share."""

    selective = True
    tolerance = 1.0

    @property
    def period(self) -> int:
        each = self.values.period if self.values else 1  # of the values that are kept
        return BLOCK * math.lcm(each, KEPT) // KEPT

    def sections(self, count: int) -> tuple[int, ...]:
        kept = _kept(count)
        return 2 * kept, *(self.values.sections(kept) if self.values else (4 * kept,))

    def pack(self, values: Values) -> Packed:
        whole = values.size - values.size % BLOCK
        parts = (values[:whole].reshape(-1, BLOCK), values[whole:].reshape(1, -1))
        where, chosen = zip(*map(_largest, parts), strict=True)
        kept = np.concatenate(chosen)
        sizes = self.values.pack(kept) if self.values else kept.astype("<f4").view(np.uint8)
        return np.concatenate([np.concatenate(where).astype("<u2").view(np.uint8), sizes])

    def unpack(self, packed: Packed, count: int) -> Values:
        kept = _kept(count)
        where = np.frombuffer(packed[: 2 * kept].tobytes(), "<u2").astype(np.int64)
        rest = packed[2 * kept :]
        chosen = self.values.unpack(rest, kept) if self.values else _floats(rest)
        whole, tail = divmod(count, BLOCK)
        rows = where[: whole * KEPT].reshape(whole, KEPT)
        for block, size in ((rows, BLOCK), (where[whole * KEPT :].reshape(1, -1), tail)):
            if (block[:, 1:] <= block[:, :-1]).any() or (block.size and block.max() >= size):
                raise BadPayload("positions in an update must rise and lie within their block")
        starts = np.repeat(np.arange(whole + 1) * BLOCK, [KEPT] * whole + [kept - whole * KEPT])
        values = np.zeros(count, np.float32)
        values[starts + where] = chosen
        return values


def _kept(count: int) -> int:
    whole, tail = divmod(count, BLOCK)
    return whole * KEPT + _share(tail)


def _share(count: int) -> int:
    return -(-count * KEPT // BLOCK)


def _largest(rows: Values) -> tuple[NDArray[Any], Values]:
    """Return the positions of every row's largest values, rising, and these values."""
    kept = _share(rows.shape[1])
    if not rows.size:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    where = np.sort(np.argpartition(-np.abs(rows), kept - 1, axis=1)[:, :kept], axis=1)
    return where.reshape(-1), np.take_along_axis(rows, where, axis=1).reshape(-1)


def _floats(packed: Packed) -> Values:
    return np.frombuffer(packed.tobytes(), "<f4").astype(np.float32)
