"""Where a site's training has got: in the trainer, and in checkpoints that survive the job."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.data.batches import DataCursor
from flwr_hpc.protocol import Order
from flwr_hpc.train.algorithms.base import Algorithm, Write
from flwr_hpc.train.algorithms.local_weights import LocalWeights, missing_start
from flwr_hpc.train.metrics import Meter
from flwr_hpc.train.progress import OrderProgress
from flwr_hpc.train.state.background import Background
from flwr_hpc.train.state.checkpoint import Checkpoints, DamagedCheckpointError, Saved
from flwr_hpc.train.trainer import Trainer


@dataclass
class SiteState:
    """Restores, takes over and saves what goes on from order to order."""

    trainer: Trainer
    checkpoints: Checkpoints
    background: Background  # Writes while training goes on
    train: TrainConfig
    meter: Meter
    position: tuple[int, str] = (0, "")  # Cumulative step, and the order that led there
    checkpoint_s: float = 0.0  # How long the last one took to write
    keeps: bool = False  # The weights here are the site's own, not to be lost
    notes: list[str] = field(default_factory=list)  # What a person should know, for the result
    _unsaved: tuple[str, dict[str, Any]] | None = None
    _since_checkpoint: int = 0

    def __post_init__(self) -> None:
        self.local = LocalWeights(self.trainer)

    def restore(self) -> None:
        """Go back to the newest checkpoint, or to the beginning if there is none."""
        self.background.wait()
        while True:
            try:
                saved = self.checkpoints.newest()
                self.load(saved) if saved else self._reset()
                return
            except DamagedCheckpointError as exc:
                self.notes.append(str(exc))

    def _reset(self) -> None:
        self.trainer.reset_optimizer()
        self.trainer.step, self.trainer.cursor = 0, DataCursor()
        self.position, self._unsaved = (0, ""), None

    def take_over(self, order: Order, weights: Path | None) -> str | None:
        """Go on from where another allocation of this site has got in the meantime.

        Returns
        -------
        str or None
            What an order goes on from and is not here.
        """
        newest = self.checkpoints.newest()
        if newest is not None and newest.place > self.position:
            self.load(newest, with_weights=weights is None or order.merges is not None)
        return missing_start(order, self.position[1])

    def kept(self) -> AbstractContextManager[None]:
        """Have the weights back after the block that are this site's own, and not to be lost."""
        return self.local.kept() if self.keeps else nullcontext()

    def load(
        self, saved: Saved, algorithms: Sequence[Algorithm] = (), with_weights: bool = True
    ) -> list[Algorithm]:
        """Load a checkpoint; return those of the order's algorithms that can go on from it.

        One whose tensors it lacks cannot: but then all of the order's steps are done.
        """
        known = [a for a in algorithms if not a.tensors() or a.name in saved.meta["algorithms"]]
        with self.meter.phase("transfer", "read"):
            load_weights = self.trainer.load_weights if with_weights else None
            self.checkpoints.load(saved, self._tensors(known), load_weights)
        self.trainer.step = int(saved.meta["step"])
        self.trainer.cursor = DataCursor(int(saved.meta["sequences"]))
        self.position, self._unsaved = saved.place, None
        self.keeps = bool(saved.meta.get("local"))
        self.local.forget()
        return known

    def start(self, order: Order, weights: Path | None) -> None:
        """Take over what an order starts from."""
        self.position = self.position[0], ""  # until it is done, the weights are no order's
        if order.merges is not None:
            self._unsaved = None
        if weights is not None:
            with self.meter.phase("transfer", "read"):
                self.local.read(order, weights)
        if self.train.reset_optimizer:
            self.trainer.reset_optimizer()

    def finish(
        self, order: Order, trained: OrderProgress, metrics: dict[str, float], finished: bool
    ) -> None:
        """Count an order's steps as done, all of them or, not `finished`, some."""
        meta = {
            "step": self.trainer.step, "sequences": self.trainer.cursor.sequences,
            "finished": finished, "metrics": metrics,
            "trained": dataclasses.asdict(trained), "local": order.returns is not None,
        }  # fmt: skip
        self.keeps = order.returns is not None
        self.position, self._unsaved = (self.trainer.step, order.id), (order.id, meta)
        self._since_checkpoint += 1

    def save(self, algorithms: Sequence[Algorithm] = ()) -> None:
        """Write what is unsaved, at once; a collective call."""
        self.background.wait()
        if self._unsaved is None:
            return
        order_id, meta = self._unsaved
        with self.meter.phase("transfer", "write"):
            began = time.perf_counter()
            tensors = self._tensors(algorithms)
            self.checkpoints.save(order_id, meta["step"], tensors, _noted(meta, algorithms))
            self.checkpoint_s = time.perf_counter() - began
        self._since_checkpoint, self._unsaved = 0, None

    def stage(self, algorithms: Sequence[Algorithm], weights: Path | None) -> list[Write]:
        """Copy what a checkpoint needs, if one is due; return what writes it.

        Parameters
        ----------
        algorithms : sequence of Algorithm
        weights : Path or None
            Where all of the weights will have been written by then.
        """
        due = 0 < self.train.checkpoint_every_orders <= self._since_checkpoint
        if self._unsaved is None or not due:
            return []
        order_id, meta = self._unsaved
        with self.meter.phase("transfer", "write"):
            write = self.checkpoints.stage(
                order_id, meta["step"], self._tensors(algorithms), _noted(meta, algorithms), weights
            )
        self._since_checkpoint, self._unsaved = 0, None

        def checkpoint() -> dict[str, Any]:
            began = time.perf_counter()
            write()
            self.checkpoint_s = time.perf_counter() - began
            return {}

        return [checkpoint]

    def _tensors(self, algorithms: Sequence[Algorithm]) -> dict[str, Tensor]:
        tensors = self.trainer.tensors()
        for algorithm in algorithms:
            tensors = tensors | algorithm.tensors()
        return tensors


def _noted(meta: dict[str, Any], algorithms: Sequence[Algorithm]) -> dict[str, Any]:
    return meta | {"algorithms": [a.name for a in algorithms if a.tensors()]}
