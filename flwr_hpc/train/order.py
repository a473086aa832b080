"""How the ranks of an allocation carry out an order."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.data.batches import DataCursor
from flwr_hpc.protocol import CORRECTION, GRADIENT, MEAN_GRADIENT, Order, Result
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.algorithms.control_variates import ControlVariates
from flwr_hpc.train.algorithms.local_update_share import LocalUpdate
from flwr_hpc.train.algorithms.local_weights import LocalWeights, missing_start
from flwr_hpc.train.background import Background
from flwr_hpc.train.base_model import check_base
from flwr_hpc.train.checkpoint import Checkpoints, DamagedCheckpointError, Saved
from flwr_hpc.train.metrics import Meter
from flwr_hpc.train.progress import DivergedError, OrderProgress, Proximal
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.deadline import Deadline, Stop

# Writes something of an order, and returns what its result has to say of that.
Write = Callable[[], dict[str, Any]]


@dataclass
class OrderRunner:
    """Carries out one order after the other on a loaded trainer; called on every rank."""

    trainer: Trainer
    checkpoints: Checkpoints
    files: dict[str, str]  # Text files that make the weights a Hugging Face directory
    train: TrainConfig
    meter: Meter
    deadline: Deadline  # Asked before each training step
    background: Background  # Writes while training goes on
    base: str = ""  # sha256 of the frozen base under an adapter
    step_s: float = 0.0
    _weights_s: float = 0.0
    _checkpoint_s: float = 0.0
    _position: tuple[int, str] = (0, "")  # Cumulative step, and the order that led there
    _unsaved: tuple[str, dict[str, Any]] | None = None
    _writes: list[Write] = field(default_factory=list)  # Of the order that has just ended
    _variates: ControlVariates | None = None
    _keeps: bool = False  # The weights here are the site's own, not to be lost
    _since_checkpoint: int = 0
    _notes: list[str] = field(default_factory=list)  # What a person should know, for the result

    def __post_init__(self) -> None:
        self._update = LocalUpdate(self.trainer)
        self._local = LocalWeights(self.trainer)

    def run(
        self,
        order: Order,
        weights: Path | None,
        folder: OrderDir,
        extra_arrays: Mapping[str, Path] | None = None,
    ) -> Result | None:
        """Return the result, to be published next; None if it is left to another job."""
        check_base(order, self.base)
        self.background.check()
        self.meter.begin()
        self._writes = []
        if order.kind == "initialize":
            return self._initialize(order, folder)
        if order.kind == "evaluate":
            return self._evaluate(order, weights)
        return self._train(order, weights, folder, (extra_arrays or {}).get(CORRECTION))

    def publish(self, folder: OrderDir, result: Result) -> None:
        """Publish an order's result once all is written that belongs to it; on every rank.

        That is done while the next order is trained. A result is not seen before its checkpoint:
        a job that takes over, or one that is killed, lacks nothing of an answered order.
        """
        writes, self._writes = self._writes, []
        first = self.meter.group.ranks.rank == 0
        if not writes:
            if first:
                folder.write_result(result)
            return

        def work() -> None:
            answer, began = result, time.perf_counter()
            for write in writes:
                answer = dataclasses.replace(answer, **write())
            self.deadline.reserve_s = 2.0 * (self.write_s + self.step_s) + 1.0
            waited = answer.seconds.get("write", 0.0)
            answer.seconds["write_wait"] = waited
            answer.seconds["write"] = waited + time.perf_counter() - began
            if first:
                folder.write_result(answer)

        self.background.start(work)

    def restore(self) -> None:
        """Go back to the newest checkpoint, or to the beginning if there is none."""
        self.background.wait()
        while True:
            try:
                saved = self.checkpoints.newest()
                self._load(saved) if saved else self._reset()
                return
            except DamagedCheckpointError as exc:
                self._notes.append(str(exc))

    def _reset(self) -> None:
        self.trainer.reset_optimizer()
        self.trainer.step, self.trainer.cursor = 0, DataCursor()
        self._position, self._unsaved = (0, ""), None

    def save(self) -> None:
        """Wait for what is being written, and save what orders left unsaved; a collective call."""
        self.background.wait()
        if self._unsaved is not None and self.train.checkpoint_every_orders > 0:
            self._save(*self._unsaved)

    @property
    def write_s(self) -> float:
        """How long weights and checkpoint take to write, 0 before they were."""
        # A checkpoint holds the weights and, with AdamW, twice as much besides.
        return self._weights_s + (self._checkpoint_s or 3.0 * self._weights_s)

    # The kinds of order

    def _initialize(self, order: Order, folder: OrderDir) -> Result:
        self._write_weights(folder, None)
        return Result(
            order.id, "done", weights=folder.weights.name,
            files=self.files, seconds=self.meter.seconds,
        )  # fmt: skip

    def _evaluate(self, order: Order, weights: Path | None) -> Result:
        with self._local.kept() if self._keeps else nullcontext():
            if weights is not None:
                with self.meter.phase("transfer", "read"):
                    self.trainer.load_weights(weights)
            metrics, sequences = self._held_out()
        return Result(
            order.id, "done", tokens=int(metrics["held_out_tokens"]), examples=sequences,
            metrics=metrics | self.meter.memory(), seconds=self.meter.seconds,
        )  # fmt: skip

    def _train(
        self, order: Order, weights: Path | None, folder: OrderDir, correction: Path | None
    ) -> Result | None:
        """Train, and once more from the last good state if it diverges or a checkpoint is bad."""
        try:
            return self._try_to_train(order, weights, folder, correction)
        except DivergedError as exc:
            self._notes.append(f"{exc}. Started again from the last good checkpoint")
            self.meter.note(folder, self._notes[-1])
        except DamagedCheckpointError as exc:
            self._notes.append(str(exc))
        self.restore()
        return self._try_to_train(order, weights, folder, correction)

    def _try_to_train(
        self, order: Order, weights: Path | None, folder: OrderDir, correction: Path | None
    ) -> Result | None:
        self._variates = None
        # A checkpoint of this very order: the job that worked on it died.
        saved = self.checkpoints.newest(order.id)
        if saved is None:
            self._take_over(with_weights=weights is None or order.merges is not None)
            if missing := missing_start(order, self._position[1]):
                return Result(order.id, "failed", error=missing, refused=True)
        if correction or order.options.get(MEAN_GRADIENT):
            self._variates = self.trainer.variates(correction)
        proximal = self._begin(order, weights, saved)
        trained, metrics = self._resume(saved) if saved else (OrderProgress(), self._measure(order))
        if not (saved and saved.meta["finished"]):
            trained = self._steps(order, folder, trained, proximal)
            if trained.stopped and not trained.steps:
                return None  # nothing to tell: the next allocation does better
            finished = trained.stopped != Stop.LEAVE
            meta = self._finish(order, trained, metrics, finished)
            if not finished:
                self._save(order.id, meta)
                return None
        self._update.end(order)
        return self._report(order, folder, trained, metrics)

    # Phases of a training order

    def _take_over(self, with_weights: bool) -> None:
        """Go on from where another allocation of this site has got in the meantime."""
        newest = self.checkpoints.newest()
        if newest is not None and newest.place > self._position:
            with self.meter.phase("transfer", "read"):
                self._load(newest, with_weights)

    def _begin(self, order: Order, weights: Path | None, saved: Saved | None) -> Proximal | None:
        mu = float(order.options.get("proximal-mu", 0.0))
        if saved is None or mu:
            self._position = self._position[0], ""  # until it is done, the weights are no order's
            if order.merges is not None:
                self._unsaved = None
            if weights is not None:
                with self.meter.phase("transfer", "read"):
                    self._local.read(order, weights)
        proximal = self.trainer.proximal(mu) if mu else None
        if saved:
            with self.meter.phase("transfer", "read"):
                self._load(saved)
        elif self.train.reset_optimizer:
            self.trainer.reset_optimizer()
        return proximal

    def _resume(self, saved: Saved) -> tuple[OrderProgress, dict[str, float]]:
        """Return how far an earlier job got, and what it measured before."""
        trained = OrderProgress(**saved.meta["trained"])
        self.meter.seconds["resumed"] = trained.seconds
        self._update.forget()
        return trained, saved.meta["metrics"]

    def _measure(self, order: Order) -> dict[str, float]:
        """Evaluate the version that an order starts from, if it asks for that."""
        metrics: dict[str, float] = {}
        if order.evaluate and order.merges is None:
            metrics = self._held_out()[0]
        elif order.evaluate and self._local.has_version:
            with self._local.version():
                metrics = self._held_out()[0]
        return metrics | self._update.begin(order)

    def _steps(
        self, order: Order, folder: OrderDir, trained: OrderProgress, proximal: Proximal | None
    ) -> OrderProgress:
        steps = order.steps
        self.trainer.lr_scale = float(order.options.get("lr-scale", 1.0))
        before = dataclasses.replace(trained)
        report = self.meter.progress(folder, trained.steps, steps)
        self.meter.first_step()
        with self.meter.phase("train", "train"):
            extras = proximal, self._variates
            trained = self.trainer.train(steps, trained, self._should_stop, report, *extras)
        if trained.steps > before.steps:
            self.step_s = (trained.seconds - before.seconds) / (trained.steps - before.steps)
        return trained

    def _should_stop(self) -> Stop:
        return self.deadline.should_stop(self.step_s)

    def _report(
        self, order: Order, folder: OrderDir, trained: OrderProgress, metrics: dict[str, float]
    ) -> Result:
        self._write_weights(folder, order.returns)
        self._write_gradient(order, folder, trained)
        if 0 < self.train.checkpoint_every_orders <= self._since_checkpoint:
            self._stage(folder.weights if order.returns is None else None)
        self._variates = None
        return Result(
            order.id, "done",
            steps=trained.steps, tokens=trained.tokens, examples=trained.sequences,
            metrics=metrics | self.meter.metrics(trained) | self.meter.memory(),
            note=self._take_notes(),
            weights=folder.weights.name, seconds=self.meter.seconds,
        )  # fmt: skip

    def _take_notes(self) -> str:
        notes, self._notes = self._notes, []
        return "; ".join(notes)

    def _held_out(self) -> tuple[dict[str, float], int]:
        with self.meter.phase("evaluate", "evaluate"):
            found = self.trainer.evaluate()
        return {"held_out_loss": found.loss, "held_out_tokens": found.tokens}, found.sequences

    # Checkpoints

    def _finish(
        self, order: Order, trained: OrderProgress, metrics: dict[str, float], finished: bool
    ) -> dict[str, Any]:
        """Count the order's steps as done; return what a checkpoint notes of that."""
        meta = {
            "step": self.trainer.step, "sequences": self.trainer.cursor.sequences,
            "finished": finished, "metrics": metrics,
            "trained": dataclasses.asdict(trained), "local": order.returns is not None,
        }  # fmt: skip
        self._keeps = order.returns is not None
        self._position, self._unsaved = (self.trainer.step, order.id), (order.id, meta)
        self._since_checkpoint += 1
        return meta

    def _save(self, order_id: str, meta: dict[str, Any]) -> None:
        """Write a checkpoint at once."""
        self.background.wait()
        with self.meter.phase("transfer", "write"):
            began = time.perf_counter()
            tensors, meta = self._tensors(meta)
            self.checkpoints.save(order_id, meta["step"], tensors, meta)
            self._checkpoint_s = time.perf_counter() - began
        self._since_checkpoint, self._unsaved = 0, None

    def _stage(self, weights: Path | None) -> None:
        """Copy what a checkpoint of the order needs, to be written in the background."""
        if self._unsaved is None:
            return  # it is there: an earlier job died between checkpoint and result
        order_id, meta = self._unsaved
        with self.meter.phase("transfer", "write"):
            tensors, meta = self._tensors(meta)
            write = self.checkpoints.stage(order_id, meta["step"], tensors, meta, weights)
        self._since_checkpoint, self._unsaved = 0, None

        def checkpoint() -> dict[str, Any]:
            began = time.perf_counter()
            write()
            self._checkpoint_s = time.perf_counter() - began
            return {}

        self._writes.append(checkpoint)

    def _tensors(self, meta: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        summed = self._variates.tensors() if self._variates else {}
        return self.trainer.tensors() | summed, meta | {"summed": bool(summed)}

    def _load(self, saved: Saved, with_weights: bool = True) -> None:
        tensors = self.trainer.tensors()
        if self._variates is not None and saved.meta.get("summed"):
            tensors = tensors | self._variates.tensors()
        else:
            self._variates = None  # nobody knows the sum any more; all steps are done
        load_weights = self.trainer.load_weights if with_weights else None
        self.checkpoints.load(saved, tensors, load_weights)
        self.trainer.step = int(saved.meta["step"])
        self.trainer.cursor = DataCursor(int(saved.meta["sequences"]))
        self._position, self._unsaved = saved.place, None
        self._keeps = bool(saved.meta.get("local"))
        self._local.forget()

    # Files

    def _write_weights(self, folder: OrderDir, names: Collection[str] | None) -> None:
        self.background.wait()  # what was gathered for the order before is written by then
        with self.meter.phase("transfer", "write"):
            publish = self.trainer.gather_weights(folder.weights, names)

        def write() -> dict[str, Any]:
            began = time.perf_counter()
            sha256 = publish()
            self._weights_s = time.perf_counter() - began
            return {"sha256": sha256}

        self._writes.append(write)

    def _write_gradient(self, order: Order, folder: OrderDir, trained: OrderProgress) -> None:
        """Write the mean gradient, if it was asked for and is known."""
        if self._variates is None or not order.options.get(MEAN_GRADIENT):
            return
        with self.meter.phase("transfer", "write"):
            publish = self.trainer.gather_gradient(
                folder.arrays(GRADIENT), self._variates, trained.steps
            )
        self._writes.append(lambda: {"extra_arrays": {GRADIENT: publish()}})
