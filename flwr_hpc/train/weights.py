"""Where tensors of torch meet files of weights.

They are written by rank 0, which gathers one tensor at a time, or, if they are large, by all ranks:
each writes the rows that it has, and where several have the same, its share of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.shards.cuts import Rows, slice_layout
from flwr_hpc.exchange.shards.manifest import (
    MAX_SHARDS,
    SUFFIX,
    Manifest,
    Shard,
    WeightFiles,
    remove_others,
    shard_file,
)
from flwr_hpc.exchange.tensorfile import write_safetensors
from flwr_hpc.exchange.tensors import (
    FLOATS,
    BadPayload,
    Layout,
    TensorInfo,
    Tensors,
    check_layout,
    check_values,
    widen,
)
from flwr_hpc.train.parallel.tensors import cut_in_rows, extent, full, local
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.state.background import told
from flwr_hpc.worker.lifeline import RankError

HOST_SHARE = 0.25  # Of the host's memory that weights may take while they wait to be written

Named = Iterable[tuple[str, Tensor]]


def layout_of(tensors: Named) -> dict[str, TensorInfo]:
    """Describe tensors as they travel: in float32."""
    return {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in tensors}


def write_weights(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> str:
    """Publish float32 tensors, in the order of `layout`; return the file's sha256."""
    arrays = (tensor.contiguous().numpy() for tensor in tensors)
    return write_safetensors(path, zip(layout, arrays, strict=True), layout)


def writes_later(
    path: Path, layout: Layout, tensors: Iterator[Tensor], share: float = HOST_SHARE
) -> Callable[[], str]:
    """Take tensors as they come and return what publishes them; too large ones at once.

    Parameters
    ----------
    path : Path
    layout : Layout
        Of the tensors, in their order.
    tensors : iterator of Tensor
        Float32, on the host; nobody else changes them.
    share : float
        Of the host's memory.
    """
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _nbytes(layout) > share * host:
        sha256 = write_weights(path, layout, tensors)
        return lambda: sha256
    waiting = list(tensors)
    return lambda: write_weights(path, layout, waiting)


@dataclass(frozen=True)
class Staged:
    """Weights that wait to be written while training goes on."""

    path: Path  # Of what will name them: their only file, or the manifest of their shards
    publish: Callable[[], str]  # A collective call, from any thread; the path's sha256 on rank 0


class WeightsWriter:
    """Writes tensors that are sharded over the ranks as the weights are.

    Parameters
    ----------
    group : Group
    weights : mapping of str to Tensor
        This rank's view of all tensors there are, by name in the file.
    shards_above : float
        Bytes from which on each rank writes its own; of fewer rank 0 makes one file.
    """

    def __init__(self, group: Group, weights: Mapping[str, Tensor], shards_above: float) -> None:
        self._group, self._weights, self._shards_above = group, weights, shards_above
        self._rows: dict[str, Rows] = {}  # that this rank writes

    def stage(self, path: Path, tensors: Named, layout: Layout) -> Staged:
        """Copy tensors to the host and return what publishes them; a collective call.

        Parameters
        ----------
        path : Path
            For a single file; a manifest and shards have names beside it.
        tensors : iterable of (str, Tensor)
        layout : Layout
            Of the tensors, in their order.
        """
        ranks = self._group.ranks
        if 1 < ranks.world_size <= MAX_SHARDS and _nbytes(layout) >= self._shards_above:
            return self._in_shards(path, tensors, layout)
        whole = (full(tensor) for _, tensor in tensors)
        if ranks.rank:
            for _ in whole:  # take part in gathering
                pass
            return Staged(path, lambda: "")
        write = writes_later(path, layout, whole)

        def publish() -> str:
            sha256 = write()
            remove_others(path, path)
            return sha256

        return Staged(path, publish)

    def _in_shards(self, path: Path, tensors: Named, layout: Layout) -> Staged:
        ranks, manifest = self._group.ranks, path.with_suffix(SUFFIX)
        mine = self._own_rows()
        rows = {name: mine[name] for name in layout if name in mine}
        file = shard_file(path, ranks.rank, ranks.world_size)
        share = HOST_SHARE / ranks.local_world_size
        write = writes_later(file, slice_layout(layout, rows), _parts(tensors, rows), share)

        def shard() -> Shard | None:
            sha256 = write()  # which is a file of a header alone, where this rank has no rows
            return Shard(sha256, file.stat().st_size, rows, file.name) if rows else None

        def publish() -> str:
            found = self._from_all(shard)
            if ranks.rank:
                return ""
            sha256 = Manifest(layout, [s for s in found if s is not None]).write(manifest)
            remove_others(path, manifest)
            return sha256

        return Staged(manifest, publish)

    def _own_rows(self) -> dict[str, Rows]:
        """Return the rows that this rank writes: its share of those that it has with others."""
        if not self._rows:
            mine = {name: _rows(cut_in_rows(tensor)) for name, tensor in self._weights.items()}
            every = self._group.gather(mine)
            for name, (start, stop) in mine.items():
                same = [rank for rank, theirs in enumerate(every) if theirs[name] == mine[name]]
                place, count = same.index(self._group.ranks.rank), stop - start
                first, last = (start + count * k // len(same) for k in (place, place + 1))
                if first < last:
                    self._rows[name] = (first, last)
        return self._rows

    def _from_all(self, work: Callable[[], Shard | None]) -> list[Shard | None]:
        """Do a rank's own work; return what it is on all ranks, or raise what failed on any."""
        done, error = None, None
        try:
            done = work()
        except Exception as exc:
            error = exc
        every = self._group.gather((done, told(error)), self._group.background)
        if error:
            raise error
        for _, failed in every:
            if failed:
                raise RankError(failed[0], cause=failed[1])
        return [shard for shard, _ in every]


def read_weights(path: Path, layout: Layout, targets: Mapping[str, Tensor]) -> None:
    """Fill this rank's parts of tensors from a file or shards; bfloat16 becomes what they are.

    Of a file it reads nothing but its header and these parts, and so knows no more of the
    values: ranks have to refuse it together (`Group.refuse_together`).

    Parameters
    ----------
    path : Path
        Of the file, or of the manifest of shards, which other ranks may have cut.
    layout : Layout
        Of all that has to be there.
    targets : mapping of str to Tensor
        Some or all of it.
    """
    try:
        found = WeightFiles.open(path).whole
    except (OSError, BadPayload) as exc:
        raise UserError(f"weights {path} cannot be read: {exc}") from None
    try:
        check_layout(found.layout, layout, FLOATS)
        for name, target in targets.items():
            bits, info = _part(found, name, extent(target)), found.layout[name]
            check_values(name, bits, info, layout[name])
            with torch.no_grad():
                local(target).copy_(torch.from_numpy(widen(bits, info.dtype)))
    except BadPayload as exc:
        raise UserError(
            f"weights {path.name} do not fit the model: {exc}. "
            "All facilities must use the same model configuration and tokenizer."
        ) from None


def _part(tensors: Tensors, name: str, where: tuple[slice, ...]) -> NDArray[Any]:
    """Return a part of a tensor, as stored."""
    if not where:
        return tensors.raw(name)
    first, *others = where
    return tensors.rows(name, first.start, first.stop)[slice(None), *others]


def _rows(tensor: Tensor) -> Rows:
    """Return which rows of the whole a rank has; a number is one row."""
    first, *_ = extent(tensor) or (slice(0, 1),)
    return first.start, first.stop


def _parts(tensors: Named, rows: Mapping[str, Rows]) -> Iterator[Tensor]:
    """Yield copies on the host, in float32, of what of tensors is in these rows."""
    for name, tensor in tensors:
        cut = cut_in_rows(tensor)
        if name in rows:
            (first, _), (start, stop), part = _rows(cut), rows[name], local(cut)
            part = part[start - first : stop - first] if part.ndim else part
            yield part.to("cpu", torch.float32, copy=True)


def _nbytes(layout: Layout) -> int:
    return sum(info.nbytes for info in layout.values())
