"""The trainer's state on disk: sharded (torch DCP), published whole, the last few kept.

::

    SITE/checkpoints/<order id>@<cumulative step>/   DCP files and meta.json

A checkpoint can be loaded at another world size than it was saved at.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from flwr_hpc.files import publish, read_json, sync_dir
from flwr_hpc.spool import CHECKPOINT_META, checkpoint_name
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.state.background import Staging
from flwr_hpc.worker.lifeline import RankError, cause_of

# torch derives the former from BaseException, so that it passes every ``except Exception``.
FAILURES = (CheckpointException, Exception)


class DamagedCheckpointError(Exception):
    """A checkpoint cannot be loaded and was set aside; tensors may be filled in part."""


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint: its folder and what was noted with it."""

    path: Path
    meta: dict[str, Any]

    @property
    def order_id(self) -> str:
        """Which order was running."""
        return _place(self.path)[1]

    @property
    def place(self) -> tuple[int, str]:
        """Cumulative step and order: the greater, the newer."""
        return _place(self.path)


class Checkpoints:
    """The checkpoints of one site.

    Parameters
    ----------
    root : Path
    group : Group
        The ranks that save and load together.
    keep : int
        How many complete checkpoints stay, at least 2.
    writer : str
        Name of this allocation.
    """

    def __init__(self, root: Path, group: Group, keep: int = 2, writer: str = "") -> None:
        self._root = root
        self._writer = writer
        self._group = group
        self._keep = keep
        self._staging = Staging()

    def sweep(self, has_ended: Callable[[str], bool]) -> None:
        """Remove what killed jobs have left half-written, or half-removed.

        Parameters
        ----------
        has_ended : callable
            Whether an allocation of that name writes no more. (A successor is loaded while the
            one before it still writes.) An earlier start of this one does not.
        """
        if self._group.ranks.rank:
            return
        for left in [*self._root.glob(".*.tmp"), *self._root.glob(".*.old")]:
            writer = left.name.removesuffix(".tmp").rpartition(".")[2]
            if left.suffix == ".old" or writer == self._writer or has_ended(writer):
                shutil.rmtree(left, ignore_errors=True)

    def newest(self, order_id: str | None = None) -> Saved | None:
        """Return the newest complete checkpoint (of an order); the same on every rank."""
        saved = None
        if self._group.ranks.rank == 0:
            found = [p for p in self._all() if order_id in (None, _place(p)[1])]
            if found:
                saved = Saved(found[-1], _read_meta(found[-1]))
        agreed: Saved | None = self._group.broadcast(saved)
        if agreed and not agreed.meta:
            raise self._set_aside(agreed, f"{CHECKPOINT_META} is missing or damaged")
        return agreed

    def save(self, order_id: str, step: int, tensors: dict[str, Tensor], meta: Any) -> None:
        """Publish a checkpoint; a collective call.

        Parameters
        ----------
        order_id : str
            The order that was running.
        step : int
            Cumulative step of the facility.
        tensors : dict of str to Tensor
            This rank's view: DTensors, or tensors that are the same on every rank.
        meta : dict
            JSON.
        """
        self._write(checkpoint_name(order_id, step), tensors, meta)

    def stage(
        self, order_id: str, step: int, tensors: dict[str, Tensor], meta: Any
    ) -> Callable[[], None]:
        """Copy the tensors and return what publishes them, from any thread; a collective call.

        Only one checkpoint may be staged at a time. Parameters are those of `save`.
        """
        name, copies = checkpoint_name(order_id, step), self._staging.copy(tensors)
        return lambda: self._write(name, copies, meta)

    def _write(self, name: str, tensors: dict[str, Tensor], meta: Any) -> None:
        target, group = self._root / name, self._group
        draft = target.with_name(f".{name}.{self._writer}.tmp")
        first = group.ranks.rank == 0
        exists = first and target.exists()
        if first and not exists:
            self._make_room()
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        if group.broadcast(exists, group.background):
            return  # saved before by a job that died afterwards
        try:
            state_dict_saver.save(tensors, checkpoint_id=draft, process_group=group.background)
            if first:
                publish(draft / CHECKPOINT_META, json.dumps(meta, allow_nan=False))
                draft.rename(target)
                sync_dir(self._root)
        except FAILURES as exc:
            if first:
                shutil.rmtree(draft, ignore_errors=True)
            words = f"checkpoint {target} cannot be written: {_reason(exc)}"
            raise RankError(words, cause=cause_of(exc)) from exc

    def load(self, saved: Saved, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place; a collective call.

        Raises
        ------
        DamagedCheckpointError
            On every rank. The next newest is another.
        """
        try:
            state_dict_loader.load(tensors, checkpoint_id=saved.path)
        except FAILURES as exc:
            if (cause := cause_of(exc)) != "work":
                raise RankError(_reason(exc), cause=cause) from exc
            raise self._set_aside(saved, _reason(exc)) from exc

    def _set_aside(self, saved: Saved, reason: str) -> DamagedCheckpointError:
        """Rename a damaged one, for a person to look at; only the last such one is kept."""
        aside = saved.path.with_name(f".{saved.path.name}.damaged")
        if self._group.ranks.rank == 0 and saved.path.exists():  # else deleted while it was read
            for other in self._root.glob(".*.damaged"):
                shutil.rmtree(other, ignore_errors=True)
            saved.path.rename(aside)
            sync_dir(self._root)
        return DamagedCheckpointError(
            f"checkpoint {saved.path.name} is damaged ({reason}) and was set aside as {aside}"
        )

    def _all(self) -> list[Path]:
        """Return the complete ones, oldest first."""
        if not self._root.is_dir():
            return []
        names = [n for n in os.listdir(self._root) if "@" in n and not n.startswith(".")]
        return sorted((self._root / n for n in names), key=_place)

    def _make_room(self) -> None:
        """Keep one less than may stay, before one more is written: the newest is among them."""
        for path in self._all()[: 1 - self._keep]:
            # Rename first: a half-removed checkpoint must not look complete.
            waste = path.with_name(f".{path.name}.old")
            path.rename(waste)
            shutil.rmtree(waste, ignore_errors=True)


def _place(path: Path) -> tuple[int, str]:
    order_id, _, step = path.name.rpartition("@")
    return int(step), order_id


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / CHECKPOINT_META) or {}
    except ValueError:
        return {}


def _reason(error: BaseException) -> str:
    """Say what went wrong on the first rank of those that torch names."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0][:300]}"
