"""Tensors cut along their first dimension, and put together again; loaded when asked for. No torch.

So a codec that knows nothing of shards encodes one: `Sliced` weights against a `Sliced` base.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.exchange.tensors import BadPayload, Layout, TensorInfo, Tensors

OPEN = 4  # shards of a tensor that are read at the same time: in order, ahead by a block a core

Rows = tuple[int, int]  # A range of a tensor's first dimension; a number is one row
Cut = Mapping[str, Rows]  # What of each tensor is in a shard


def row_count(info: TensorInfo) -> int:
    """Return how many rows a tensor has."""
    return info.shape[0] if info.shape else 1


@lru_cache(1 << 12)  # the same ones for many shards
def rows_info(info: TensorInfo, rows: int) -> TensorInfo:
    """Describe so many rows of a tensor."""
    return TensorInfo(info.dtype, (rows, *info.shape[1:]) if info.shape else ())


def all_rows(layout: Layout) -> dict[str, Rows]:
    """Return the cut that has everything."""
    return {name: (0, row_count(info)) for name, info in layout.items() if row_count(info)}


def slice_layout(layout: Layout, cut: Cut) -> dict[str, TensorInfo]:
    """Describe a shard of a layout, as far as that has these rows."""
    found = {}
    for name, (start, stop) in cut.items():
        if (info := layout.get(name)) is not None:
            rows = row_count(info)
            found[name] = rows_info(info, max(0, min(stop, rows) - min(start, rows)))
    return found


def check_cuts(cuts: Sequence[Cut], layout: Layout) -> None:
    """Raise a BadPayload unless the cuts have each row of each tensor once, and no other."""
    found: dict[str, list[Rows]] = defaultdict(list)
    for cut in cuts:
        for name, rows in cut.items():
            found[name].append(rows)
    if unknown := found.keys() - layout.keys():
        raise BadPayload(f"shards have a tensor '{min(unknown)[:200]}', which is unknown")
    for name, info in layout.items():
        at = 0
        for start, stop in sorted(found[name]):
            if start != at or stop <= start:
                what = "has no rows" if stop <= start else "has them twice or leaves some out"
                raise BadPayload(f"tensor '{name}': a shard of rows {start} to {stop} {what}")
            at = stop
        if at != row_count(info):
            raise BadPayload(f"tensor '{name}' has {row_count(info)} rows, its shards {at}")


class Sliced(Tensors):
    """A shard of tensors; nothing is copied.

    Rows that a tensor does not have are left out, and so are tensors that are not there: where a
    base is another model's, nothing is relative to it.
    """

    def __init__(self, whole: Tensors, cut: Cut) -> None:
        self._whole, self._cut = whole, cut
        self.layout = slice_layout(whole.layout, cut)

    def raw(self, name: str) -> NDArray[Any]:
        """Return the shard's rows."""
        return self._whole.rows(name, *self._cut[name])

    def reader(self, name: str) -> Callable[[slice], NDArray[Any]]:
        """Return what reads ranges of the shard's values."""
        info, whole = self.layout[name], self._whole.reader(name)
        first = self._cut[name][0] * info.size // max(1, row_count(info))

        def read(part: slice) -> NDArray[Any]:
            start, stop, _ = part.indices(info.size)
            return whole(slice(first + start, first + max(start, stop)))

        return read

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return some of the shard's rows."""
        first, end = self._cut[name]
        return self._whole.rows(name, first + start, min(first + stop, end))


class Joined(Tensors):
    """Whole tensors of their shards; one that is in a single shard is not copied.

    Parameters
    ----------
    shards : sequence of (Tensors, Cut)
    layout : Layout
        Names and shapes of the whole; the dtypes are those in the shards.

    Raises
    ------
    BadPayload
        Unless the shards make up exactly the whole.
    """

    def __init__(self, shards: Sequence[tuple[Tensors, Cut]], layout: Layout) -> None:
        check_cuts([cut for _, cut in shards], layout)
        self._parts: dict[str, list[tuple[int, int, Tensors]]] = {name: [] for name in layout}
        for tensors, cut in shards:
            _check_shard(tensors, cut, layout)
            for name, (start, stop) in cut.items():
                self._parts[name].append((start, stop, tensors))
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[:2])
        self.layout = {name: self._info(name, info) for name, info in layout.items()}

    def raw(self, name: str) -> NDArray[Any]:
        """Return all rows."""
        return self.rows(name, 0, row_count(self.layout[name]))

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return some rows, read from no other shard than has them."""
        found = [
            tensors.rows(name, max(start, first) - first, min(stop, last) - first)
            for first, last, tensors in self._parts[name]
            if first < stop and start < last
        ]
        if len(found) == 1:
            return found[0]
        if not found:
            info = rows_info(self.layout[name], 0)
            return np.empty(info.shape, info.stored)
        return np.concatenate(found)

    def reader(self, name: str) -> Callable[[slice], NDArray[Any]]:
        """Return what reads ranges of a tensor's values, out of the shards that have them."""
        info = self.layout[name]
        if not self._parts[name]:
            return super().reader(name)
        if len(self._parts[name]) == 1:  # rows that nobody else has: all of them
            return self._parts[name][0][2].reader(name)
        row, shards = info.size // row_count(info), self._parts[name]
        opened, one_at_a_time = lru_cache(OPEN)(lambda k: shards[k][2].reader(name)), Lock()

        def read(part: slice) -> NDArray[Any]:
            start, stop, _ = part.indices(info.size)
            found = []
            for k, (first, last, _) in enumerate(shards):
                low, high = max(start, first * row), min(stop, last * row)
                if low < high:
                    with one_at_a_time:  # opening may be decoding
                        values = opened(k)
                    found.append(values(slice(low - first * row, high - first * row)))
            nothing = np.empty(0, info.widened)
            return found[0] if len(found) == 1 else np.concatenate([nothing, *found])

        return read

    def _info(self, name: str, info: TensorInfo) -> TensorInfo:
        dtypes = {tensors.layout[name].dtype for _, _, tensors in self._parts[name]}
        if len(dtypes) > 1:
            raise BadPayload(f"shards of tensor '{name}' are {' and '.join(sorted(dtypes))}")
        return TensorInfo(dtypes.pop() if dtypes else info.dtype, info.shape)


def _check_shard(tensors: Tensors, cut: Cut, layout: Layout) -> None:
    for name, expected in slice_layout(layout, cut).items():
        if name not in tensors.layout:
            raise BadPayload(f"a shard lacks its rows of tensor '{name}'")
        if (shape := tensors.layout[name].shape) != expected.shape:
            raise BadPayload(f"a shard of '{name}' has shape {shape}, expected {expected.shape}")
