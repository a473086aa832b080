"""How the ranks of an allocation carry out an order."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr_hpc.protocol import RESIDUAL, Order, Result
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.algorithms.base import Algorithm, Write
from flwr_hpc.train.algorithms.chosen import chosen
from flwr_hpc.train.algorithms.local_update_share import LocalUpdate
from flwr_hpc.train.base_model import check_base
from flwr_hpc.train.progress import DivergedError, OrderProgress
from flwr_hpc.train.state.checkpoint import DamagedCheckpointError, Saved
from flwr_hpc.train.state.site_state import SiteState
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.train.weights import Staged
from flwr_hpc.worker.deadline import Deadline, Stop


@dataclass
class OrderRunner:
    """Carries out one order after the other on a loaded trainer; called on every rank."""

    state: SiteState
    files: dict[str, str]  # Text files that make the weights a Hugging Face directory
    deadline: Deadline  # Asked before each training step
    base: str = ""  # sha256 of the frozen base under an adapter
    # ``(trainer, order, files of its extra arrays)``: what of algorithms the order asks for.
    algorithms: Callable[[Trainer, Order, Mapping[str, Path]], list[Algorithm]] = chosen
    step_s: float = 0.0
    _weights_s: float = 0.0
    _writes: list[Write] = field(default_factory=list)  # Of the order that has just ended
    _checkpoint: Callable[[], None] | None = None  # Of it, if one is due

    def __post_init__(self) -> None:
        self.trainer, self.meter = self.state.trainer, self.state.meter
        self.background = self.state.background
        self._update = LocalUpdate(self.trainer)

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
        self._writes, self._checkpoint = [], None
        self.trainer.set_residual((extra_arrays or {}).get(RESIDUAL))
        if order.kind == "initialize":
            return self._initialize(order, folder)
        if order.kind == "evaluate":
            return self._evaluate(order, weights)
        return self._train(order, weights, folder, extra_arrays or {})

    def publish(self, folder: OrderDir, result: Result) -> None:
        """Publish an order's result once all is written that belongs to it; on every rank.

        That is done while the next order is trained. A result is not seen before its checkpoint:
        a job that takes over, or one that is killed, lacks nothing of an answered order.
        """
        writes, checkpoint = self._writes, self._checkpoint
        first = self.meter.group.ranks.rank == 0
        if not writes:
            if first:
                folder.write_result(result)
            return

        def work() -> None:
            answer, began = result, time.perf_counter()
            for write in writes:
                written = self.background.together(write)
                metrics = answer.metrics | written.pop("metrics", {})
                answer = dataclasses.replace(answer, metrics=metrics, **written)
            if checkpoint:
                self.background.together(lambda: folder.write_answer(answer) if first else None)
                self.background.together(checkpoint)
            self.deadline.reserve_s = 2.0 * (self.write_s + self.step_s) + 1.0
            waited = answer.seconds.get("write", 0.0)
            answer.seconds["write_wait"] = waited
            answer.seconds["write"] = waited + time.perf_counter() - began
            if first:
                folder.write_result(answer)

        self._writes, self._checkpoint = [], None
        self.background.start(work)

    def restore(self) -> None:
        """Go back to the newest checkpoint, or to the beginning if there is none."""
        self.state.restore()

    def save(self) -> None:
        """Wait for what is being written, and save what orders left unsaved; a collective call."""
        self.background.wait()
        if self.state.train.checkpoint_every_orders > 0:
            self.state.save()

    @property
    def write_s(self) -> float:
        """How long weights and checkpoint take to write, 0 before they were."""
        # A checkpoint holds the weights and, with AdamW, twice as much besides.
        return self._weights_s + (self.state.checkpoint_s or 3.0 * self._weights_s)

    # The kinds of order

    def _initialize(self, order: Order, folder: OrderDir) -> Result:
        staged = self._write_weights(folder, self.trainer.stage_initial)
        return Result(
            order.id, "done", weights=staged.path.name,
            files=self.files, seconds=self.meter.seconds,
        )  # fmt: skip

    def _evaluate(self, order: Order, weights: Path | None) -> Result:
        with self.state.kept():
            if weights is not None:
                with self.meter.phase("transfer", "read"):
                    self.trainer.load_weights(weights)
            metrics, sequences = self._held_out()
        return Result(
            order.id, "done", tokens=int(metrics["held_out_tokens"]), examples=sequences,
            metrics=metrics | self.meter.memory(), seconds=self.meter.seconds,
        )  # fmt: skip

    def _train(self, order: Order, *given: Any) -> Result | None:
        """Train, and once more from the last good state if it diverges or a checkpoint is bad."""
        try:
            return self._try_to_train(order, *given)
        except DivergedError as exc:
            self.state.notes.append(f"{exc}. Started again from the last good checkpoint")
            self.meter.note(given[1], self.state.notes[-1])
        except DamagedCheckpointError as exc:
            self.state.notes.append(str(exc))
        self.restore()
        return self._try_to_train(order, *given)

    def _try_to_train(
        self,
        order: Order,
        weights: Path | None,
        folder: OrderDir,
        extra_arrays: Mapping[str, Path],
    ) -> Result | None:
        # A checkpoint of this very order: the job that worked on it died.
        saved = self.state.checkpoints.newest(order.id)
        if saved and saved.meta["finished"]:
            if answer := self._answer(folder):
                self._update.forget()
                self.state.load(saved)
                return answer
            saved = None
        if saved is None and (missing := self.state.take_over(order, weights)):
            return Result(order.id, "failed", error=missing, refused=True)
        active = [*self.algorithms(self.trainer, order, extra_arrays), self._update]
        if saved:
            trained, metrics = self._resume(order, saved, active)
        else:
            trained, metrics = OrderProgress(), self._begin(order, weights, active)
        trained = self._steps(order, folder, trained, active)
        if trained.stopped and not trained.steps:
            return None  # nothing to tell: the next allocation does better
        finished = trained.stopped != Stop.LEAVE
        self.state.finish(order, trained, metrics, finished)
        if not finished:
            self.state.save(active)
            return None
        return self._end(order, weights, folder, trained, metrics, active)

    def _answer(self, folder: OrderDir) -> Result | None:
        """Return the result that a job has left behind its order's checkpoint; the same on all."""
        group = self.meter.group
        answer: Result | None = group.broadcast(None if group.ranks.rank else folder.answer())
        return answer

    # Phases of a training order

    def _begin(
        self, order: Order, weights: Path | None, active: list[Algorithm]
    ) -> dict[str, float]:
        """Take over what the order starts from; evaluate that version, if the order asks for it."""
        self.state.start(order, weights)
        metrics: dict[str, float] = {}
        if order.evaluate:
            with self.state.local.version(order) as is_here:
                metrics = self._held_out()[0] if is_here else {}
        for algorithm in active:
            metrics |= algorithm.begin(order)
        return metrics

    def _resume(
        self, order: Order, saved: Saved, active: list[Algorithm]
    ) -> tuple[OrderProgress, dict[str, float]]:
        """Go on from where an earlier job got: what it trained, and what it measured before."""
        for algorithm in active:
            algorithm.resume(order)
        self.state.load(saved, active)
        trained = OrderProgress(**saved.meta["trained"])
        self.meter.seconds["resumed"] = trained.seconds
        return trained, saved.meta["metrics"]

    def _steps(
        self, order: Order, folder: OrderDir, trained: OrderProgress, active: list[Algorithm]
    ) -> OrderProgress:
        self.trainer.lr_scale = float(order.options.get("lr-scale", 1.0))
        before = dataclasses.replace(trained)
        report = self.meter.progress(folder, trained.steps, order.steps)
        self.meter.first_step()
        with self.meter.phase("train", "train"):
            trained = self.trainer.train(order.steps, trained, self._should_stop, report, active)
        if trained.steps > before.steps:
            self.step_s = (trained.seconds - before.seconds) / (trained.steps - before.steps)
        return trained

    def _should_stop(self) -> Stop:
        return self.deadline.should_stop(self.step_s)

    def _end(
        self,
        order: Order,
        weights: Path | None,
        folder: OrderDir,
        trained: OrderProgress,
        metrics: dict[str, float],
        active: list[Algorithm],
    ) -> Result:
        def stage(path: Path) -> Staged:
            start = self.trainer.start(order.id, weights)
            return self.trainer.stage_weights(path, order.returns, start)

        staged = self._write_weights(folder, stage)
        with self.meter.phase("transfer", "write"):
            for algorithm in active:
                self._writes += algorithm.end(order, folder, trained.steps)
        self._checkpoint = self.state.stage()
        return Result(
            order.id, "done",
            steps=trained.steps, tokens=trained.tokens, examples=trained.sequences,
            metrics=metrics | self.meter.metrics(trained) | self.meter.memory(),
            note=self._take_notes(),
            weights=staged.path.name, seconds=self.meter.seconds,
        )  # fmt: skip

    def _take_notes(self) -> str:
        notes, self.state.notes = self.state.notes, []
        return "; ".join(notes)

    def _held_out(self) -> tuple[dict[str, float], int]:
        with self.meter.phase("evaluate", "evaluate"):
            found = self.trainer.evaluate()
        return {"held_out_loss": found.loss, "held_out_tokens": found.tokens}, found.sequences

    def _write_weights(self, folder: OrderDir, stage: Callable[[Path], Staged]) -> Staged:
        """Copy weights, and have them written with the result."""
        self.background.wait()  # what was copied for the order before is written by then
        with self.meter.phase("transfer", "write"):
            staged = stage(folder.weights)

        def write() -> dict[str, Any]:
            began = time.perf_counter()
            sha256 = staged.publish()
            self._weights_s = time.perf_counter() - began
            return {"sha256": sha256, "metrics": staged.metrics}

        self._writes.append(write)
        return staged
