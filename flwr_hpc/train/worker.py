"""Runs in every rank of an allocation: load once, carry out orders, stop in time.

Nothing heavy is imported at module level: the launcher sees ``starting`` before torch is read.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from flwr_hpc.errors import UserError
from flwr_hpc.files import open_many_files
from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import AllocationDir, OrderDir
from flwr_hpc.worker.deadline import Deadline
from flwr_hpc.worker.inbox import Inbox
from flwr_hpc.worker.lifeline import (
    LoneFailureError,
    PeerLostError,
    RankError,
    cause_of,
    end_process,
    silence,
)
from flwr_hpc.worker.phase_timer import PhaseTimer
from flwr_hpc.worker.progress_watch import ProgressWatch
from flwr_hpc.worker.ranks import Ranks
from flwr_hpc.worker.reporter import Reporter
from flwr_hpc.worker.settings import WorkerSettings

# Where a user sets up torch's allocator of GPU memory, by any of its names.
GPU_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

if TYPE_CHECKING:
    from flwr_hpc.train.order import OrderRunner
    from flwr_hpc.train.rendezvous import Failure


def run(allocation_dir: Path) -> None:
    """Serve an allocation, whose folder `flwr_hpc.spool` describes; called once in every rank."""
    open_many_files()  # of weights in shards all are open
    allocation, ranks = AllocationDir(Path(allocation_dir)), Ranks.detect()
    settings = WorkerSettings.read(allocation)
    mine = allocation if ranks.rank == 0 else None
    former = mine.state() if mine else None  # of this job before it was requeued
    timer = PhaseTimer(former.seconds if former else {})
    # Other nodes have other clocks; rank 0 decides for all when time is up.
    deadline = Deadline.detect(settings.walltime_s) if mine else Deadline()
    watch = ProgressWatch(timer, settings.progress_timeout_s)
    beat = former.beat if former else 0
    with Reporter(mine, timer, deadline, beat, watch=watch) as reporter:
        reporter.set_state("starting")
        try:
            _prepare_environment(settings)
            worker = Worker(allocation, settings, ranks, timer, reporter, deadline)
            final = worker.serve()
        except Exception as exc:
            cause, fatal = cause_of(exc), isinstance(exc, UserError)
            if cause == "peer":  # what became of it the scheduler knows best
                end_process(f"{traceback.format_exc()}\na rank of this allocation is gone; ending")
            explained = isinstance(exc, UserError | RankError)
            error = str(exc) if explained else f"{type(exc).__name__}: {exc}"
            reporter.set_state("failed", error=error, fatal=fatal, disk=cause == "disk")
            if isinstance(exc, LoneFailureError):
                end_process(traceback.format_exc())
            raise
        reporter.set_state(*final)


class Worker:
    """One rank of an allocation, with everything loaded."""

    def __init__(
        self,
        allocation: AllocationDir,
        settings: WorkerSettings,
        ranks: Ranks,
        timer: PhaseTimer,
        reporter: Reporter,
        deadline: Deadline,
    ) -> None:
        from flwr_hpc.train.rendezvous import join

        self._settings, self._allocation, self._spool = settings, allocation, allocation.spool
        self._timer, self._reporter, self._deadline = timer, reporter, deadline
        self._group = join(
            allocation.path, ranks, on_silent=lambda rank: reporter.give_up(silence(rank))
        )
        timer.switch_to("load")
        reporter.set_state("loading")
        self._runner = self._load()
        self._inbox = Inbox(
            allocation, allocation.spool, settings.idle_timeout_s,
            should_stop=self._should_leave,
        )  # fmt: skip

    def _left(self, failure: Failure) -> Exception:
        """Leave the group in order, unless it lost a rank; return what to raise."""
        if failure.cause != "peer":
            self._runner.background.drain()
            self._group.close()
        return _error(failure)

    def serve(self) -> tuple[str, str, str]:
        """Carry out orders until released, idle for too long, out of walltime or told to end.

        Returns
        -------
        tuple
            The worker's last state: its name, no order, error.
        """
        from flwr_hpc.train.rendezvous import COLLECTIVE

        self._timer.switch_to("idle")
        too_late = bool(self._deadline.should_stop())
        if not too_late:
            self._reporter.set_state("ready")
        while task := self._next():
            self._reporter.set_state("running", order_id=task[0].id)
            if not self._carry_out(*task):
                break
            self._reporter.set_state("ready")
        _, failures = self._group.attempt(self._runner.save, COLLECTIVE.total_seconds())
        if failures:
            raise self._left(failures[0])
        self._group.close()
        if self._deadline.interrupted:
            return "interrupted", "", ""
        return ("failed", "", self._why_too_late()) if too_late else ("closed", "", "")

    def _should_leave(self) -> bool:
        self._reporter.progressed()  # an idle worker does nothing but look
        if self._runner.background.failed:  # the launcher waits for a result that never comes
            return True
        return bool(self._deadline.should_stop(self._runner.step_s))

    def _load(self) -> OrderRunner:
        """Load data and model on every rank; all of them fail if one does."""
        from flwr_hpc.train.rendezvous import COLLECTIVE

        def load() -> OrderRunner:
            from flwr_hpc.train.load import load

            return load(
                self._settings, self._allocation, self._group,
                self._timer, self._reporter, self._deadline,
            )  # fmt: skip

        runner, failures = self._group.attempt(load, patience_s=COLLECTIVE.total_seconds())
        if runner is None or failures:
            if failures[0].cause != "peer":
                self._group.close()
            raise _error(failures[0])
        runner.restore()
        return runner

    def _next(self) -> tuple[Order, Path | None, dict[str, Path]] | None:
        """Wait for the next order: rank 0 looks, all get to know.

        The order itself travels along, as other nodes may see its file later.
        """
        task = None
        if self._group.ranks.rank == 0 and (order_id := self._inbox.next()):
            folder = self._spool.order(order_id)
            task = *folder.order(), folder.extra_arrays()
        agreed: tuple[Order, Path | None, dict[str, Path]] | None = self._group.broadcast(task)
        return agreed

    def _carry_out(self, order: Order, weights: Path | None, extra_arrays: dict[str, Path]) -> bool:
        """Publish the order's result; return False if it is left to another allocation."""
        folder, step = self._spool.order(order.id), self._runner.trainer.step
        try:
            result, failures = self._group.attempt(
                lambda: self._runner.run(order, weights, folder, extra_arrays)
            )
        except LoneFailureError as exc:
            if exc.cause == "work":
                _refuse(folder, order, str(exc), exc.fatal)
            raise
        if failures:
            first = failures[0]
            if self._group.ranks.rank == 0 and first.cause == "work":
                _refuse(folder, order, first.message, first.fatal)
            if not first.fatal:
                # What state this left behind is not known: the next try starts afresh.
                raise self._left(first)
            if self._runner.trainer.step != step:
                self._runner.restore()
            return True
        if result is not None:
            self._inbox.answered(order.id)
            self._runner.publish(folder, result)
        return result is not None

    def _why_too_late(self) -> str:
        spent = self._timer.seconds()
        return (
            f"start-up ({spent['startup']:.0f} s) and loading ({spent['load']:.0f} s) left no time "
            "to work in this walltime. Ask for a longer one: facilities."
            f"{self._settings.facility}.walltime"
        )


def _error(failure: Failure) -> Exception:
    if failure.fatal:
        return UserError(failure.message)
    if failure.cause == "peer":
        return PeerLostError(failure.message)
    return RankError(failure.message, cause=failure.cause)


def _refuse(folder: OrderDir, order: Order, error: str, fatal: bool) -> None:
    if folder.result() is None:
        folder.write_result(Result(order.id, "failed", error=error, fatal=fatal))


def _prepare_environment(settings: WorkerSettings) -> None:
    """Before torch or anything of Hugging Face is imported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not any(name in os.environ for name in GPU_ALLOCATOR):
        # Sizes that change (gathered layers, evaluation) leave no gaps that nothing fits into.
        os.environ[GPU_ALLOCATOR[0]] = "expandable_segments:True"
    if not settings.internet:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
