"""The largest 1.6 % of an update's values (SparseLoCo, arXiv:2508.15706).

What is left out is lost unless it is brought along with later updates: ``exchange.feedback``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.exchange.compression.update import Packed, Section, UpdateCodec, Values, joined, split
from flwr_hpc.exchange.tensors import BadPayload

BLOCK = 4096  # values that are compared with each other; a step in one takes two bytes
KEPT = 64  # of each


class TopK(UpdateCodec):
    """Of each block of 4096 values the 64 largest by size; of a smaller one as large a share.

    Where they are is told in steps, from the block's start and from one to the next: there are
    few large ones, which leaves more to a lossless stage than positions do.
    """

    selective = True
    tolerance = 1.0

    @property
    def period(self) -> int:
        each = self.values.period if self.values else 1  # of the values that are kept
        return BLOCK * math.lcm(each, KEPT) // KEPT

    def sections(self, count: int) -> tuple[Section, ...]:
        kept = _kept(count)
        return ("<u2", kept), *(self.values.sections(kept) if self.values else [("<f4", kept)])

    def pack(self, values: Values) -> Packed:
        whole = values.size - values.size % BLOCK
        parts = (values[:whole].reshape(-1, BLOCK), values[whole:].reshape(1, -1))
        where, chosen = zip(*map(_largest, parts), strict=True)
        kept = np.concatenate(chosen)
        sizes = self.values.pack(kept) if self.values else joined(kept)
        return joined(np.concatenate(where).astype(np.uint16), sizes)

    def unpack(self, packed: Packed, count: int) -> Values:
        kept = _kept(count)
        (steps,), rest = split(packed, ("<u2", kept)), packed[2 * kept :]
        chosen = self.values.unpack(rest, kept) if self.values else split(rest, ("<f4", kept))[0]
        whole, tail = divmod(count, BLOCK)
        rows = steps[: whole * KEPT].reshape(whole, KEPT)
        last = steps[whole * KEPT :].reshape(1, -1)
        starts = np.arange(whole) * BLOCK
        where = [_positions(rows, starts, BLOCK), _positions(last, count - tail, tail)]
        values = np.zeros(count, np.float32)
        values[np.concatenate(where)] = chosen
        return values


def _kept(count: int) -> int:
    whole, tail = divmod(count, BLOCK)
    return whole * KEPT + _share(tail)


def _share(count: int) -> int:
    return -(-count * KEPT // BLOCK)


def _largest(rows: Values) -> tuple[NDArray[Any], Values]:
    """Return the steps to every row's largest values, and these values."""
    kept = _share(rows.shape[1])
    if not rows.size:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    where = np.sort(np.argpartition(-np.abs(rows), kept - 1, axis=1)[:, :kept], axis=1)
    steps = np.diff(where, axis=1, prepend=0)
    return steps.reshape(-1), np.take_along_axis(rows, where, axis=1).reshape(-1)


def _positions(steps: NDArray[Any], starts: Any, size: int) -> NDArray[Any]:
    """Return where the steps lead in blocks that begin at `starts`; BadPayload if out of them."""
    where = np.cumsum(steps, axis=1, dtype=np.int64)
    if (steps[:, 1:] == 0).any() or (where[:, -1:] >= size).any():
        raise BadPayload("steps in an update must be forward and stay within their block")
    return (where + np.reshape(starts, (-1, 1))).reshape(-1)
