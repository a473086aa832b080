"""How the ranks of an allocation carry out an order."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flwr_hpc.config import DataConfig, TrainConfig
from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.checkpoint import Checkpoints, Saved
from flwr_hpc.train.ledger import Ledger
from flwr_hpc.train.metrics import mfu, peak_memory_gb
from flwr_hpc.train.models import Built
from flwr_hpc.train.progress import INTERRUPTED, Proximal, Trained
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.reporter import Reporter
from flwr_hpc.train.trainer import Trainer

__all__ = ["OrderRunner"]

REPORT_EVERY_S = 1.0


@dataclass
class OrderRunner:
    """Carries out one order after the other on a loaded trainer; called on every rank.

    Parameters
    ----------
    may_go : callable
        Asked before each training step: ``GO``, ``CUT`` or ``INTERRUPTED``.
    peak_tflops : float or None
        Of one device, for MFU.

    Attributes
    ----------
    write_s : float
        How long the last weights and checkpoint took to write.
    """

    trainer: Trainer
    checkpoints: Checkpoints
    group: Group
    built: Built
    train: TrainConfig
    data: DataConfig
    ledger: Ledger
    reporter: Reporter
    may_go: Callable[[], int]
    peak_tflops: float | None = None
    write_s: float = 0.0
    step_s: float = 0.0
    _since_checkpoint: int = 0
    _seen: float = 0.0
    _seconds: dict[str, float] = field(default_factory=dict)

    def run(self, order: Order, weights: Path | None, folder: OrderDir) -> Result | None:
        """Return the result, to be published by rank 0; None if a signal interrupted it."""
        self._seen = time.perf_counter()
        self._seconds = {}
        if order.kind == "initialize":
            return self._initialize(order, folder)
        if order.kind == "evaluate":
            return self._evaluate(order, weights)
        return self._train(order, weights, folder)

    def restore(self) -> None:
        """Go back to the newest checkpoint, or to the beginning if there is none."""
        saved = self.checkpoints.newest()
        if saved:
            self._load(saved)
        else:
            self.trainer.reset_optimizer()
            self.trainer.step = 0

    # The kinds of order

    def _initialize(self, order: Order, folder: OrderDir) -> Result:
        sha256 = self._write(folder)
        return Result(
            order.id, "done", weights=folder.weights.name, sha256=sha256,
            files=self.built.files, seconds=self._seconds,
        )  # fmt: skip

    def _evaluate(self, order: Order, weights: Path | None) -> Result:
        self._read(weights)
        metrics, sequences = self._held_out()
        return Result(
            order.id, "done", tokens=int(metrics["held_out_tokens"]), examples=sequences,
            metrics=metrics | self._memory(), seconds=self._seconds,
        )  # fmt: skip

    def _train(self, order: Order, weights: Path | None, folder: OrderDir) -> Result | None:
        # A checkpoint of this very order: the job that worked on it died.
        saved = self.checkpoints.newest(order.id)
        metrics: dict[str, float] = {}
        trained = Trained()
        proximal = self._begin(order, weights, saved)
        if saved:
            metrics = saved.meta["metrics"]
            trained = Trained(**saved.meta["trained"])
        elif order.evaluate:
            metrics = self._held_out()[0]
        if not (saved and saved.meta["finished"]):
            trained = self._steps(order, folder, trained, proximal)
            finished = trained.ended != INTERRUPTED
            self._checkpoint(order, trained, metrics, finished)
            if not finished:
                return None
        sha256 = self._write(folder)
        return Result(
            order.id, "done",
            steps=trained.steps, tokens=trained.tokens, examples=trained.sequences,
            metrics=metrics | self._metrics(trained) | self._memory(),
            weights=folder.weights.name, sha256=sha256, seconds=self._seconds,
        )  # fmt: skip

    # Phases of an order

    def _begin(self, order: Order, weights: Path | None, saved: Saved | None) -> Proximal | None:
        mu = float(order.options.get("proximal-mu", 0.0))
        if saved is None or mu:
            self._read(weights)
        proximal = self.trainer.proximal(mu) if mu else None
        if saved:
            with self._phase("transfer", "read"):
                self._load(saved)
        elif self.train.reset_optimizer:
            self.trainer.reset_optimizer()
        return proximal

    def _steps(
        self, order: Order, folder: OrderDir, trained: Trained, proximal: Proximal | None
    ) -> Trained:
        steps = int(order.options.get("steps", 0)) or order.steps or self.train.steps
        before = dataclasses.replace(trained)
        report = self._reporting(order, folder, trained.steps, steps)
        self._seconds["first_step"] = time.perf_counter() - self._seen
        with self._phase("train", "train"):
            trained = self.trainer.train(steps, trained, self.may_go, report, proximal)
        if trained.steps > before.steps:
            self.step_s = (trained.seconds - before.seconds) / (trained.steps - before.steps)
        return trained

    def _reporting(
        self, order: Order, folder: OrderDir, first: int, steps: int
    ) -> Callable[[int, Callable[[], float]], None]:
        """Report about once a second, on rank 0: reading the loss waits for the device."""
        began = reported = time.perf_counter()

        def report(step: int, loss: Callable[[], float]) -> None:
            nonlocal reported
            now = time.perf_counter()
            if self.group.ranks.rank or (now - reported < REPORT_EVERY_S and step > first + 1):
                return
            reported, value = now, loss()
            speed = (step - first) * self._tokens_per_step() / (time.perf_counter() - began)
            progress = {"step": step, "steps": steps, "tokens_per_s": speed}
            if math.isfinite(value):
                progress["loss"] = value
            self.reporter.progress(folder, progress)

        return report

    def _checkpoint(
        self, order: Order, trained: Trained, metrics: dict[str, float], finished: bool
    ) -> None:
        self._since_checkpoint += 1
        every = self.train.checkpoint_every_orders
        due = trained.steps > 0 if not finished else 0 < every <= self._since_checkpoint
        if not due:
            return
        meta = {
            "step": self.trainer.step, "finished": finished, "metrics": metrics,
            "trained": dataclasses.asdict(trained),
        }  # fmt: skip
        with self._phase("transfer", "write"):
            self.checkpoints.save(order.id, self.trainer.step, self.trainer.tensors(), meta)
        self._since_checkpoint = 0

    def _load(self, saved: Saved) -> None:
        self.checkpoints.load(saved, self.trainer.tensors())
        self.trainer.step = int(saved.meta["step"])

    def _read(self, weights: Path | None) -> None:
        if weights is not None:
            with self._phase("transfer", "read"):
                self.trainer.load_weights(weights)

    def _write(self, folder: OrderDir) -> str:
        with self._phase("transfer", "write"):
            sha256 = self.trainer.save_weights(folder.weights)
        self.write_s = self._seconds["write"]
        return sha256

    def _held_out(self) -> tuple[dict[str, float], int]:
        with self._phase("evaluate", "evaluate"):
            found = self.trainer.evaluate()
        return {"held_out_loss": found.loss, "held_out_tokens": found.tokens}, found.sequences

    @contextmanager
    def _phase(self, ledger_name: str, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with self.ledger.phase(ledger_name):
                yield
        finally:
            ran = time.perf_counter() - began
            self._seconds[name] = self._seconds.get(name, 0.0) + ran

    # Numbers

    def _tokens_per_step(self) -> int:
        sequences = self.train.micro_batch * self.train.accumulation
        return sequences * self.group.ranks.world_size * self.data.seq_len

    def _metrics(self, trained: Trained) -> dict[str, float]:
        if not trained.steps:
            return {}
        speed = trained.steps * self._tokens_per_step() / max(trained.seconds, 1e-9)
        metrics = {
            "train_loss": trained.loss_sum / max(1, trained.tokens),
            "last_loss": trained.last_loss,
            "grad_norm": trained.last_grad_norm,
            "tokens_per_s": speed,
        }
        devices = self.group.ranks.world_size
        used = mfu(speed, self.built.flops_per_token, devices, self.peak_tflops)
        return metrics if used is None else metrics | {"mfu": used}

    def _memory(self) -> dict[str, float]:
        """The most any rank held; a collective call."""
        return {"peak_memory_gb": self.group.largest(peak_memory_gb(self.group.device))}
