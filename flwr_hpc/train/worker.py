"""Runs in every rank of an allocation: load once, then carry out orders until it is time to end.

Nothing heavy is imported at module level: the launcher sees ``starting`` before torch is read.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr_hpc.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
from flwr_hpc.errors import UserError
from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import AllocationDir, OrderDir, Spool
from flwr_hpc.train.inbox import Inbox
from flwr_hpc.train.ledger import Ledger, process_start
from flwr_hpc.train.lifeline import LoneFailureError, end_process
from flwr_hpc.train.ranks import Ranks
from flwr_hpc.train.reporter import Reporter

if TYPE_CHECKING:
    from flwr_hpc.train.orders import OrderRunner
    from flwr_hpc.train.rendezvous import Group

__all__ = ["run"]

RESERVED_SHARE = 0.1  # of the walltime, kept for writing until a write was measured
RESERVED_MOST_S = 60.0


def run(allocation_dir: Path) -> None:
    """Serve an allocation; called once in every rank.

    Parameters
    ----------
    allocation_dir : Path
        The allocation's folder with ``spec.json``; see `flwr_hpc.spool`.

    Raises
    ------
    UserError
        If the model or the data cannot be loaded as configured.
    """
    allocation = AllocationDir(Path(allocation_dir))
    ranks = Ranks.detect()
    ledger = Ledger(process_start())
    spec = Spec.of(allocation)
    # Other nodes have other clocks; rank 0 decides for all when time is up.
    ending = Ending(_walltime_s(spec) if ranks.rank == 0 else None)
    mine = allocation if ranks.rank == 0 else None
    with Reporter(mine, ledger, ending.walltime_left) as reporter:
        reporter.say("starting")
        try:
            _environment(spec)
            worker = Worker(allocation, spec, ranks, ledger, reporter, ending)
            worker.serve()
        except Exception as exc:
            error = str(exc) if isinstance(exc, UserError) else f"{type(exc).__name__}: {exc}"
            reporter.say("failed", error=error, fatal=isinstance(exc, UserError))
            if isinstance(exc, LoneFailureError):
                end_process(traceback.format_exc())
            raise
        reporter.say("closed")


@dataclass(frozen=True)
class Spec:
    """What the launcher wrote in ``spec.json``."""

    facility: str
    facilities: list[str]
    seed: int
    spool: Spool
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    rounds: int
    idle_timeout_s: float
    walltime_s: float | None
    peak_tflops: float | None
    internet: bool

    @classmethod
    def of(cls, allocation: AllocationDir) -> Spec:
        raw: dict[str, Any] = allocation.spec()
        model = dict(raw["model"])
        model["lora"] = LoraConfig(**(model.get("lora") or {}))
        given: dict[str, Any] = {
            "spool": Spool(Path(raw["spool"])), "model": ModelConfig(**model),
            "data": DataConfig(**raw["data"]), "train": TrainConfig(**raw["train"]),
        }  # fmt: skip
        known: dict[str, Any] = {name: raw.get(name) for name in cls.__dataclass_fields__}
        return cls(**known | given)


class Ending:
    """Knows when the worker has to end: a signal, or the walltime.

    SIGTERM comes when a job is cancelled or preempted, SIGUSR1 and SIGUSR2 where a site asks
    for a warning ahead of the walltime.
    """

    def __init__(self, walltime_s: float | None) -> None:
        self._end = None if walltime_s is None else process_start() + walltime_s
        self._signalled = threading.Event()
        # Until a write was measured.
        self.reserve_s = min(RESERVED_MOST_S, RESERVED_SHARE * (walltime_s or 0.0))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, lambda *_: self._signalled.set())

    def walltime_left(self) -> float | None:
        return None if self._end is None else self._end - time.monotonic()

    @property
    def signalled(self) -> bool:
        return self._signalled.is_set()

    def out_of_time(self, next_s: float = 0.0) -> bool:
        """Whether `next_s` more seconds of work would leave too little to write."""
        left = self.walltime_left()
        return left is not None and left < self.reserve_s + next_s


class Worker:
    """One rank of an allocation, with everything loaded.

    Raises
    ------
    UserError
        If the model or the data cannot be loaded as configured.
    """

    def __init__(
        self,
        allocation: AllocationDir,
        spec: Spec,
        ranks: Ranks,
        ledger: Ledger,
        reporter: Reporter,
        ending: Ending,
    ) -> None:
        import torch

        from flwr_hpc.train.rendezvous import join

        torch.set_num_threads(ranks.cpu_threads())
        self._spec = spec
        self._ledger = ledger
        self._reporter = reporter
        self._ending = ending
        self._group = join(allocation.path, ranks)
        ledger.switch("load")
        reporter.say("loading")
        self._runner = self._load()
        self._inbox = Inbox(
            allocation, spec.spool, spec.idle_timeout_s,
            must_end=lambda: ending.signalled or ending.out_of_time(self._runner.step_s),
        )  # fmt: skip

    def serve(self) -> None:
        """Carry out orders until released, idle for too long, out of walltime or told to end."""
        self._ledger.switch("idle")
        self._reporter.say("ready")
        while task := self._next():
            self._reporter.say("running", order_id=task[0].id)
            if not self._carry_out(*task):
                break
            self._reporter.say("ready")
        self._group.close()

    def _next(self) -> tuple[Order, Path | None] | None:
        """Wait for the next order: rank 0 looks, all get to know.

        The order itself travels along, as other nodes may see its file later.
        """
        task = None
        if self._group.ranks.rank == 0 and (order_id := self._inbox.next()):
            task = self._spec.spool.order(order_id).order()
        agreed: tuple[Order, Path | None] | None = self._group.broadcast(task)
        return agreed

    def _carry_out(self, order: Order, weights: Path | None) -> bool:
        """Publish the order's result; return False if it was interrupted."""
        from flwr_hpc.train.rendezvous import Failure

        folder = self._spec.spool.order(order.id)
        step = self._runner.trainer.step
        result, mine = None, None
        try:
            result = self._runner.run(order, weights, folder)
        except Exception as exc:
            mine = Failure.of(exc)
        try:
            failures = self._group.failures(mine)
        except LoneFailureError as exc:
            self._refuse(folder, order, Failure(str(exc), mine is not None and mine.fatal))
            raise
        if failures:
            if self._group.ranks.rank == 0:
                self._refuse(folder, order, failures[0])
            if not failures[0].fatal:
                # Nobody knows what state this left behind: the next try starts afresh.
                self._group.close()
                raise RuntimeError(failures[0].message)
            if self._runner.trainer.step != step:
                self._runner.restore()
            return True
        if result is not None and self._group.ranks.rank == 0:
            folder.write_result(result)
        self._measure_reserve()
        return result is not None

    def _refuse(self, folder: OrderDir, order: Order, failure: Any) -> None:
        if folder.result() is None:
            folder.write_result(
                Result(order.id, "failed", error=failure.message, fatal=failure.fatal)
            )

    def _measure_reserve(self) -> None:
        if self._runner.write_s:
            self._ending.reserve_s = 2.0 * (self._runner.write_s + self._runner.step_s) + 1.0

    def _load(self) -> OrderRunner:
        """Load data and model on every rank; all of them fail if one does."""
        from flwr_hpc.train.rendezvous import COLLECTIVE, Failure

        runner, mine = None, None
        try:
            runner = _runner(self._spec, self._group, self._ledger, self._reporter)
        except Exception as exc:
            mine = Failure.of(exc)
            cause = exc
        for failure in self._group.failures(mine, patience_s=COLLECTIVE.total_seconds()):
            self._group.close()
            if mine:
                raise cause
            raise (UserError if failure.fatal else RuntimeError)(failure.message)
        assert runner is not None
        runner.may_go = self._may_go
        runner.restore()
        return runner

    def _may_go(self) -> int:
        from flwr_hpc.train.progress import CUT, GO, INTERRUPTED

        if self._ending.signalled:
            return INTERRUPTED
        return CUT if self._ending.out_of_time(self._runner.step_s) else GO


def _runner(spec: Spec, group: Group, ledger: Ledger, reporter: Reporter) -> OrderRunner:
    from flwr_hpc.train.checkpoint import Checkpoints
    from flwr_hpc.train.data import load_corpus
    from flwr_hpc.train.models import build
    from flwr_hpc.train.orders import OrderRunner
    from flwr_hpc.train.progress import GO
    from flwr_hpc.train.schedule import schedule_steps
    from flwr_hpc.train.trainer import Trainer

    corpus = load_corpus(
        spec.data, spec.facility, spec.facilities, spec.seed, spec.spool.root / "cache"
    )
    checkpointing = spec.train.activation_checkpointing
    built = build(spec.model, corpus.tokenizer, spec.seed, spec.data.seq_len, checkpointing)
    total = schedule_steps(spec.train, spec.rounds)
    return OrderRunner(
        trainer=Trainer(built, corpus, spec.train, total, group),
        checkpoints=Checkpoints(spec.spool.checkpoints, group),
        group=group, built=built, train=spec.train, data=spec.data,
        ledger=ledger, reporter=reporter, may_go=lambda: GO, peak_tflops=spec.peak_tflops,
    )  # fmt: skip


def _walltime_s(spec: Spec) -> float | None:
    """Return what the scheduler granted, else what was asked for."""
    granted = os.environ.get("FLWR_HPC_WALLTIME_S")
    return float(granted) if granted else spec.walltime_s


def _environment(spec: Spec) -> None:
    """Before anything of Hugging Face is imported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not spec.internet:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
