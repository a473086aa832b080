"""Runs in every rank of an allocation: load once, then carry out orders until it is time to end.

Nothing heavy is imported at module level: the launcher sees ``starting`` before torch is read.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr_hpc.errors import UserError
from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import AllocationDir, OrderDir, Spool
from flwr_hpc.worker.deadline import Deadline
from flwr_hpc.worker.inbox import Inbox
from flwr_hpc.worker.ledger import PhaseTimer, process_start
from flwr_hpc.worker.lifeline import LoneFailureError, end_process
from flwr_hpc.worker.ranks import Ranks
from flwr_hpc.worker.reporter import Reporter
from flwr_hpc.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from flwr_hpc.train.order import OrderRunner
    from flwr_hpc.train.rendezvous import Group


def run(allocation_dir: Path) -> None:
    """Serve an allocation; called once in every rank.

    Parameters
    ----------
    allocation_dir : Path
        The allocation's folder with ``settings.json``; see `flwr_hpc.spool`.
    """
    allocation = AllocationDir(Path(allocation_dir))
    ranks = Ranks.detect()
    mine = allocation if ranks.rank == 0 else None
    former = mine.state() if mine else None  # of this job before it was requeued
    ledger = PhaseTimer(process_start(), former.seconds if former else {})
    spec = WorkerSettings.read(allocation)
    # Other nodes have other clocks; rank 0 decides for all when time is up.
    ending = Deadline.detect(spec.walltime_s) if mine else Deadline()
    beat = former.beat if former else 0
    with Reporter(mine, ledger, ending.walltime_left, beat=beat) as reporter:
        reporter.say("starting")
        try:
            _environment(spec)
            worker = Worker(allocation, spec, ranks, ledger, reporter, ending)
            last_word = worker.serve()
        except Exception as exc:
            error = str(exc) if isinstance(exc, UserError) else f"{type(exc).__name__}: {exc}"
            reporter.say("failed", error=error, fatal=isinstance(exc, UserError))
            if isinstance(exc, LoneFailureError):
                end_process(traceback.format_exc())
            raise
        reporter.say(*last_word)


class Worker:
    """One rank of an allocation, with everything loaded."""

    def __init__(
        self,
        allocation: AllocationDir,
        spec: WorkerSettings,
        ranks: Ranks,
        ledger: PhaseTimer,
        reporter: Reporter,
        ending: Deadline,
    ) -> None:
        import torch

        from flwr_hpc.train.rendezvous import join

        torch.set_num_threads(ranks.cpu_threads())
        self._spec, self._spool = spec, allocation.spool
        self._ledger = ledger
        self._reporter = reporter
        self._ending = ending
        self._group = join(allocation.path, ranks)
        ledger.switch("load")
        reporter.say("loading")
        self._runner = self._load()
        self._inbox = Inbox(
            allocation, self._spool, spec.idle_timeout_s,
            should_stop=lambda: ending.interrupted or ending.is_due(self._runner.step_s),
        )  # fmt: skip

    def serve(self) -> tuple[str, str, str]:
        """Carry out orders until released, idle for too long, out of walltime or told to end.

        Returns
        -------
        tuple
            What the worker says last: state, no order, error.
        """
        self._ledger.switch("idle")
        late = self._ending.is_due()
        if not late:
            self._reporter.say("ready")
        while task := self._next():
            self._reporter.say("running", order_id=task[0].id)
            if not self._carry_out(*task):
                break
            self._reporter.say("ready")
        self._runner.save()
        self._group.close()
        if self._ending.interrupted:
            return "interrupted", "", ""
        return ("failed", "", self._too_late()) if late else ("closed", "", "")

    def _too_late(self) -> str:
        spent = self._ledger.seconds()
        return (
            f"start-up ({spent['startup']:.0f} s) and loading ({spent['load']:.0f} s) left no time "
            "to work in this walltime. Ask for a longer one: facilities."
            f"{self._spec.facility}.walltime"
        )

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

    def _carry_out(self, order: Order, weights: Path | None, further: dict[str, Path]) -> bool:
        """Publish the order's result; return False if it is left to another allocation."""
        from flwr_hpc.train.rendezvous import Failure

        folder = self._spool.order(order.id)
        step = self._runner.trainer.step
        result, mine = None, None
        try:
            result = self._runner.run(order, weights, folder, further)
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
        if write_s := self._runner.write_s:
            self._ending.reserve_s = 2.0 * (write_s + self._runner.step_s) + 1.0

    def _load(self) -> OrderRunner:
        """Load data and model on every rank; all of them fail if one does."""
        from flwr_hpc.train.rendezvous import COLLECTIVE, Failure

        runner, mine = None, None
        try:
            runner = _runner(self._spec, self._spool, self._group, self._ledger, self._reporter)
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

        if self._ending.interrupted:
            return INTERRUPTED
        return CUT if self._ending.is_due(self._runner.step_s) else GO


def _runner(
    spec: WorkerSettings, spool: Spool, group: Group, ledger: PhaseTimer, reporter: Reporter
) -> OrderRunner:
    import torch

    from flwr_hpc.data.batches import load_corpus
    from flwr_hpc.train.checkpoint import Checkpoints
    from flwr_hpc.train.model import build
    from flwr_hpc.train.order import OrderRunner
    from flwr_hpc.train.progress import GO
    from flwr_hpc.train.schedule import schedule_steps
    from flwr_hpc.train.trainer import Trainer

    if spec.gpus_per_node and group.device.type == "cpu":
        raise UserError(
            f"facilities.{spec.facility} has gpus_per_node={spec.gpus_per_node}, but PyTorch "
            f"{torch.__version__} sees no GPU in the job. It takes a build for CUDA or ROCm, in "
            f"facilities.{spec.facility}.python or .container. To train on CPUs: "
            f"facilities.{spec.facility}.gpus_per_node=0"
        )
    corpus = load_corpus(spec.data, spec.facility, spec.facilities, spec.seed, spool.cache)
    checkpointing = spec.train.activation_checkpointing
    built = build(spec.model, corpus.tokenizer, spec.seed, spec.data.seq_len, checkpointing)
    total = schedule_steps(spec.train, spec.rounds)
    return OrderRunner(
        trainer=Trainer(built, corpus, spec.train, total, group),
        checkpoints=Checkpoints(spool.checkpoints, group),
        group=group, built=built, train=spec.train, data=spec.data,
        ledger=ledger, reporter=reporter, may_go=lambda: GO, peak_tflops=spec.peak_tflops,
    )  # fmt: skip


def _environment(spec: WorkerSettings) -> None:
    """Before anything of Hugging Face is imported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not spec.internet:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
