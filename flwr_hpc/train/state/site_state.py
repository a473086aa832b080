"""Where a site's training has got: in the trainer, and in checkpoints that survive the job.

A checkpoint holds the optimizer's state and the place in schedule and data. Weights are in it of an
order under way, and where they are the site's own: others come with the next order.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.data.batches import DataCursor
from flwr_hpc.protocol import Order
from flwr_hpc.train.algorithms.base import Algorithm
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
    has_weights: bool = True  # Those that the order of `position` has left are here
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
        return missing_start(order, self.left_by)

    def kept(self) -> AbstractContextManager[None]:
        """Have the weights back after the block that are this site's own, and not to be lost."""
        return self.local.kept() if self.keeps else nullcontext()

    def load(
        self, saved: Saved, algorithms: Sequence[Algorithm] = (), with_weights: bool = True
    ) -> None:
        """Load a checkpoint; that of an order under way with the tensors of its algorithms."""
        self.has_weights = with_weights and bool(saved.meta["weights"])
        with self.meter.phase("transfer", "read"):
            self.checkpoints.load(saved, self._tensors(algorithms, self.has_weights))
        self.trainer.step = int(saved.meta["step"])
        self.trainer.cursor = DataCursor(int(saved.meta["sequences"]))
        self.position, self._unsaved = saved.place, None
        self.keeps = bool(saved.meta.get("local"))
        self.local.forget()

    @property
    def left_by(self) -> str:
        """Id of the order that has left the weights that are here, if one has."""
        return self.position[1] if self.has_weights else ""

    def start(self, order: Order, weights: Path | None) -> None:
        """Take over what an order starts from."""
        self.position = self.position[0], ""  # until it is done, the weights are no order's
        self.keeps = weights is None or order.returns is not None or order.merges is not None
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
            "trained": dataclasses.asdict(trained), "local": self.keeps,
            "weights": self.keeps or not finished,
        }  # fmt: skip
        self.has_weights = True
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
            tensors = self._tensors(algorithms, meta["weights"])
            self.checkpoints.save(order_id, meta["step"], tensors, meta)
            self.checkpoint_s = time.perf_counter() - began
        self._since_checkpoint, self._unsaved = 0, None

    def stage(self) -> Callable[[], None] | None:
        """Copy what is kept of an order that is over, if that is due; return what writes it."""
        due = 0 < self.train.checkpoint_every_orders <= self._since_checkpoint
        if self._unsaved is None or not due:
            return None
        order_id, meta = self._unsaved
        with self.meter.phase("transfer", "write"):
            tensors = self._tensors((), meta["weights"])
            write = self.checkpoints.stage(order_id, meta["step"], tensors, meta)
        self._since_checkpoint, self._unsaved = 0, None

        def checkpoint() -> None:
            began = time.perf_counter()
            write()
            self.checkpoint_s = time.perf_counter() - began

        return checkpoint

    def _tensors(self, algorithms: Sequence[Algorithm], with_weights: bool) -> dict[str, Tensor]:
        tensors = self.trainer.tensors(with_weights)
        for algorithm in algorithms:
            tensors = tensors | algorithm.tensors()
        return tensors
