"""Where tensors of torch meet files of weights.

They are written by rank 0, which gathers one tensor at a time, or, if they are large, by all ranks:
each writes the rows that it has, and where several have the same, its share of them. What the run's
codec makes smaller is encoded here, by those who write it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.compression.encoder import Encoded, Encoder, Start
from flwr_hpc.exchange.shards.cuts import Cut, Rows, all_rows, slice_layout
from flwr_hpc.exchange.shards.manifest import (
    MAX_SHARDS,
    SUFFIX,
    Shard,
    WeightFiles,
    remove_others,
    shard_file,
)
from flwr_hpc.exchange.tensorfile import TensorFile, write_safetensors
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
    if not _fits(layout, share):
        sha256 = write_weights(path, layout, tensors)
        return lambda: sha256
    waiting = list(tensors)
    return lambda: write_weights(path, layout, waiting)


class Copies(Tensors):
    """Tensors in the host's memory."""

    def __init__(self, layout: Layout, tensors: Iterable[Tensor]) -> None:
        self.layout = layout
        arrays = [tensor.contiguous().numpy() for tensor in tensors]
        self._arrays = dict(zip(layout, arrays, strict=True))

    def raw(self, name: str) -> NDArray[Any]:
        return self._arrays[name]


@dataclass(frozen=True)
class _Own:
    """What one rank has to write."""

    cut: Cut
    layout: Layout
    tensors: Iterator[Tensor]  # Float32, on the host
    part: tuple[int, int]  # Number of its file, and how many there are
    share: float  # Of the host's memory

    def kept(self, scratch: Path) -> Tensors:
        """Take the tensors, to be encoded later; too large ones into a file without a name."""
        if _fits(self.layout, self.share):
            return Copies(self.layout, self.tensors)
        write_weights(scratch, self.layout, self.tensors)
        file = TensorFile(scratch)
        scratch.unlink()  # it goes with the last array over it
        return file


@dataclass(frozen=True)
class Staged:
    """Weights that wait to be written while training goes on."""

    path: Path  # Of what will name them: their only file, or the manifest of their shards
    publish: Callable[[], str]  # A collective call, from any thread; the path's sha256 on rank 0
    metrics: dict[str, float] = field(default_factory=dict)  # Of the codec; once published, rank 0


class WeightsWriter:
    """Writes tensors that are sharded over the ranks as the weights are.

    Parameters
    ----------
    group : Group
    weights : mapping of str to Tensor
        This rank's view of all tensors there are, by name in the file.
    shards_above : float
        Bytes from which on each rank writes its own; of fewer rank 0 makes one file.
    encoder : Encoder
    """

    def __init__(
        self, group: Group, weights: Mapping[str, Tensor], shards_above: float, encoder: Encoder
    ) -> None:
        self._group, self._weights, self._shards_above = group, weights, shards_above
        self._encoder = encoder
        self._rows: dict[str, Rows] = {}  # that this rank writes

    def start(self, order_id: str, weights: Path | None) -> Start | None:
        """Return what an order's weights are to be sent as an update of; a collective call."""
        first = self._group.ranks.rank == 0
        start = self._encoder.start(order_id, weights) if first else None
        agreed: Start | None = self._group.broadcast(start)
        return agreed

    def stage(
        self, path: Path, tensors: Named, layout: Layout, start: Start | None = None
    ) -> Staged:
        """Copy tensors to the host and return what publishes them; a collective call.

        Parameters
        ----------
        path : Path
            For a single file of weights; a manifest and what it names lie beside it.
        tensors : iterable of (str, Tensor)
        layout : Layout
            Of the tensors, in their order.
        start : Start or None
            What they are to be sent as an update of.
        """
        plain = self._encoder.is_plain(start)
        if plain and not self._by_all(layout):
            return self._in_one_file(path, tensors, layout)
        own = self._own(tensors, layout)
        work = self._write(path, own) if plain else self._encode(path, own, start)
        metrics: dict[str, float] = {}

        def publish() -> str:
            parts = self._from_all(work if own.layout else lambda: None)
            if self._group.ranks.rank:
                return ""
            sha256, found = self._encoder.publish(path, layout, parts, start)
            metrics.update(found)
            return sha256

        return Staged(path.with_suffix(SUFFIX), publish, metrics)

    def _by_all(self, layout: Layout) -> bool:
        several = 1 < self._group.ranks.world_size <= MAX_SHARDS
        return several and _nbytes(layout) >= self._shards_above

    def _in_one_file(self, path: Path, tensors: Named, layout: Layout) -> Staged:
        if self._group.ranks.rank:
            for _ in _gathered(tensors, ()):  # take part in gathering
                pass
            return Staged(path, lambda: "")
        write = writes_later(path, layout, _gathered(tensors, layout))

        def publish() -> str:
            sha256 = write()
            remove_others(path, path)
            return sha256

        return Staged(path, publish)

    def _own(self, tensors: Named, layout: Layout) -> _Own:
        """Return what this rank has to write: its rows, or all or nothing."""
        ranks = self._group.ranks
        if self._by_all(layout):
            rows = self._own_rows()
            cut = {name: rows[name] for name in layout if name in rows}
            part, share = (ranks.rank, ranks.world_size), HOST_SHARE / ranks.local_world_size
            return _Own(cut, slice_layout(layout, cut), _parts(tensors, cut), part, share)
        cut = {} if ranks.rank else all_rows(layout)
        own = _gathered(tensors, cut)
        return _Own(cut, slice_layout(layout, cut), own, (0, 1), HOST_SHARE)

    def _write(self, path: Path, own: _Own) -> Callable[[], Encoded]:
        file = shard_file(path, *own.part)
        write = writes_later(file, own.layout, own.tensors, own.share)

        def work() -> Encoded:
            sha256 = write()
            return Encoded(Shard(sha256, file.stat().st_size, own.cut, file.name))

        return work

    def _encode(self, path: Path, own: _Own, start: Start | None) -> Callable[[], Encoded]:
        waiting = own.kept(path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp"))
        return lambda: self._encoder.encode(path, waiting, own.cut, start, own.part)

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

    def _from_all(self, work: Callable[[], Encoded | None]) -> list[Encoded]:
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
        return [written for written, _ in every if written is not None]


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


def _gathered(tensors: Named, names: Container[str]) -> Iterator[Tensor]:
    """Gather all tensors, a collective call; yield those that this rank writes."""
    for name, tensor in tensors:
        whole = full(tensor)
        if name in names:
            yield whole


def _fits(layout: Layout, share: float) -> bool:
    """Whether tensors may wait in a share of the host's memory."""
    return _nbytes(layout) <= share * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _nbytes(layout: Layout) -> int:
    return sum(info.nbytes for info in layout.values())
