"""How the ranks of an allocation carry out an order."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr_hpc.config.schema import DataConfig, TrainConfig
from flwr_hpc.protocol import CORRECTION, GRADIENT, MEAN_GRADIENT, Order, Result
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.checkpoint import Checkpoints, Saved
from flwr_hpc.train.control_variates import ControlVariates
from flwr_hpc.train.local_update_share import LocalUpdate
from flwr_hpc.train.local_weights import LocalWeights, missing_start
from flwr_hpc.train.metrics import mfu, peak_memory_gb
from flwr_hpc.train.model import Built
from flwr_hpc.train.progress import INTERRUPTED, Proximal, Trained
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.ledger import PhaseTimer
from flwr_hpc.worker.reporter import Reporter

REPORT_EVERY_S = 1.0


@dataclass
class OrderRunner:
    """Carries out one order after the other on a loaded trainer; called on every rank.

    Attributes
    ----------
    write_s : float
        How long weights and checkpoint take to write, 0 before they were.
    """

    trainer: Trainer
    checkpoints: Checkpoints
    group: Group
    built: Built
    train: TrainConfig
    data: DataConfig
    ledger: PhaseTimer
    reporter: Reporter
    may_go: Callable[[], int]  # Asked before each training step: ``GO``, ``CUT`` or ``INTERRUPTED``
    peak_tflops: float | None = None  # Of one device, for MFU
    step_s: float = 0.0
    _weights_s: float = 0.0
    _checkpoint_s: float = 0.0
    _held: tuple[int, str] = (0, "")
    _unsaved: tuple[str, dict[str, Any]] | None = None
    _variates: ControlVariates | None = None
    _keeps: bool = False  # the weights here are the site's own, not to be lost
    _since_checkpoint: int = 0
    _seen: float = 0.0
    _seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._own = LocalUpdate(self.trainer)
        self._local = LocalWeights(self.trainer)

    def run(
        self,
        order: Order,
        weights: Path | None,
        folder: OrderDir,
        further: Mapping[str, Path] | None = None,
    ) -> Result | None:
        """Return the result, to be published by rank 0; None if it is left to another job."""
        self._seen = time.perf_counter()
        self._seconds = {}
        self._variates = None
        if order.kind == "initialize":
            return self._initialize(order, folder)
        if order.kind == "evaluate":
            return self._evaluate(order, weights)
        return self._train(order, weights, folder, (further or {}).get(CORRECTION))

    def restore(self) -> None:
        """Go back to the newest checkpoint, or to the beginning if there is none."""
        saved = self.checkpoints.newest()
        if saved:
            self._load(saved)
        else:
            self.trainer.reset_optimizer()
            self.trainer.step = 0
            self._held = 0, ""

    def save(self) -> None:
        """Write down a state that the last orders left unsaved; a collective call."""
        if self._unsaved is not None and self.train.checkpoint_every_orders > 0:
            self._save(*self._unsaved)

    @property
    def write_s(self) -> float:
        # A checkpoint holds the weights and, with AdamW, twice as much besides.
        return self._weights_s + (self._checkpoint_s or 3.0 * self._weights_s)

    # The kinds of order

    def _initialize(self, order: Order, folder: OrderDir) -> Result:
        sha256 = self._write(folder)
        return Result(
            order.id, "done", weights=folder.weights.name, sha256=sha256,
            files=self.built.files, seconds=self._seconds,
        )  # fmt: skip

    def _evaluate(self, order: Order, weights: Path | None) -> Result:
        with self._local.kept() if self._keeps else nullcontext():
            if weights is not None:
                with self._phase("transfer", "read"):
                    self.trainer.load_weights(weights)
            metrics, sequences = self._held_out()
        return Result(
            order.id, "done", tokens=int(metrics["held_out_tokens"]), examples=sequences,
            metrics=metrics | self._memory(), seconds=self._seconds,
        )  # fmt: skip

    def _train(
        self, order: Order, weights: Path | None, folder: OrderDir, correction: Path | None
    ) -> Result | None:
        # A checkpoint of this very order: the job that worked on it died.
        saved = self.checkpoints.newest(order.id)
        if saved is None:
            self._take_over()
            if missing := missing_start(order, self._held[1]):
                return Result(order.id, "failed", error=missing, refused=True)
        metrics: dict[str, float] = {}
        trained = Trained()
        if correction or order.options.get(MEAN_GRADIENT):
            self._variates = self.trainer.variates(correction)
        proximal = self._begin(order, weights, saved)
        if saved:
            metrics = saved.meta["metrics"]
            trained = Trained(**saved.meta["trained"])
            self._seconds["resumed"] = trained.seconds
            self._own.forget()
        else:
            if order.evaluate and order.merges is None:
                metrics = self._held_out()[0]
            elif order.evaluate and self._local.knows_version:
                with self._local.version():
                    metrics = self._held_out()[0]
            metrics |= self._own.begin(order)
        if not (saved and saved.meta["finished"]):
            trained = self._steps(order, folder, trained, proximal)
            if trained.ended and not trained.steps:
                return None  # nothing to tell: the next allocation does better
            finished = trained.ended != INTERRUPTED
            self._checkpoint(order, trained, metrics, finished)
            if not finished:
                return None
        self._own.end(order)
        sha256 = self._write(folder, order.returns)
        further = self._write_further(order, folder, trained)
        return Result(
            order.id, "done", further=further,
            steps=trained.steps, tokens=trained.tokens, examples=trained.sequences,
            metrics=metrics | self._metrics(trained) | self._memory(),
            weights=folder.weights.name, sha256=sha256, seconds=self._seconds,
        )  # fmt: skip

    # Phases of an order

    def _take_over(self) -> None:
        """Go on from where another allocation of this site has got in the meantime."""
        newest = self.checkpoints.newest()
        if newest is not None and newest.place > self._held:
            with self._phase("transfer", "read"):
                self._load(newest)

    def _begin(self, order: Order, weights: Path | None, saved: Saved | None) -> Proximal | None:
        mu = float(order.options.get("proximal-mu", 0.0))
        if saved is None or mu:
            self._held = self._held[0], ""  # until it is done, the weights here are nobody's
            if order.merges is not None:
                self._unsaved = None
            self._read(order, weights)
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
        self.trainer.lr_scale = float(order.options.get("lr-scale", 1.0))
        before = dataclasses.replace(trained)
        report = self._reporting(order, folder, trained.steps, steps)
        self._seconds["first_step"] = time.perf_counter() - self._seen
        with self._phase("train", "train"):
            extras = proximal, self._variates
            trained = self.trainer.train(steps, trained, self.may_go, report, *extras)
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
        meta = {
            "step": self.trainer.step, "finished": finished, "metrics": metrics,
            "trained": dataclasses.asdict(trained), "local": order.returns is not None,
        }  # fmt: skip
        self._keeps = order.returns is not None
        self._held, self._unsaved = (self.trainer.step, order.id), (order.id, meta)
        self._since_checkpoint += 1
        if not finished or 0 < self.train.checkpoint_every_orders <= self._since_checkpoint:
            self._save(order.id, meta)

    def _save(self, order_id: str, meta: dict[str, Any]) -> None:
        with self._phase("transfer", "write"):
            tensors, meta = self.trainer.tensors(), meta | {"summed": self._variates is not None}
            tensors = tensors | (self._variates.tensors() if self._variates else {})
            self._checkpoint_s = self.checkpoints.save(order_id, meta["step"], tensors, meta)
        self._since_checkpoint, self._unsaved = 0, None

    def _load(self, saved: Saved) -> None:
        tensors = self.trainer.tensors()
        if self._variates is not None and saved.meta.get("summed"):
            tensors = tensors | self._variates.tensors()
        else:
            self._variates = None  # nobody knows the sum any more; all steps are done
        self.checkpoints.load(saved, tensors)
        self.trainer.step = int(saved.meta["step"])
        self._held, self._unsaved = saved.place, None
        self._keeps = bool(saved.meta.get("local"))
        self._local.forget()

    def _read(self, order: Order, weights: Path | None) -> None:
        if weights is not None:
            with self._phase("transfer", "read"):
                self._local.read(order, weights)

    def _write(self, folder: OrderDir, names: Collection[str] | None = None) -> str:
        began = time.perf_counter()
        with self._phase("transfer", "write"):
            sha256 = self.trainer.save_weights(folder.weights, names)
        self._weights_s = time.perf_counter() - began
        return sha256

    def _write_further(self, order: Order, folder: OrderDir, trained: Trained) -> dict[str, str]:
        """Write the mean gradient, if it was asked for and is known."""
        variates, self._variates = self._variates, None
        if variates is None or not order.options.get(MEAN_GRADIENT):
            return {}
        began = time.perf_counter()
        with self._phase("transfer", "write"):
            path = folder.arrays(GRADIENT)
            sha256 = self.trainer.save_gradient(path, variates, trained.steps)
        self._weights_s += time.perf_counter() - began
        return {GRADIENT: sha256}

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
