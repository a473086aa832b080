"""Runs in the batch job: takes message after message from the inbox until it is time to end.

The rank's own process imports neither the app nor torch; see `flwr_hpc.batch_mod.process`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flwr_hpc.batch_mod.carry import Failure, Reply, save
from flwr_hpc.batch_mod.crew import RankGroup, follow
from flwr_hpc.batch_mod.job_settings import JobSettings
from flwr_hpc.batch_mod.process import AppProcess, Stopped
from flwr_hpc.files import keep_files_private
from flwr_hpc.protocol import Result
from flwr_hpc.spool import AllocationDir, OrderDir
from flwr_hpc.worker.deadline import Deadline
from flwr_hpc.worker.inbox import Inbox
from flwr_hpc.worker.phase_timer import PhaseTimer
from flwr_hpc.worker.ranks import Ranks
from flwr_hpc.worker.reporter import Reporter

RESERVED_MOST_S = 10.0  # of the walltime, to write and to leave in order


def run(allocation_dir: str) -> None:
    """Serve an allocation; called once in every rank.

    Raises
    ------
    RuntimeError
        If the app cannot be imported.
    """
    keep_files_private()
    allocation, ranks = AllocationDir(Path(allocation_dir)), Ranks.detect()
    settings = JobSettings.read(allocation)
    deadline = Deadline.detect(reserve_most_s=RESERVED_MOST_S)
    if ranks.rank > 0:
        follow(allocation, ranks, settings, deadline.must_leave)
        return
    timer = PhaseTimer()
    with Reporter(allocation, timer, deadline) as reporter:
        reporter.set_state("starting")
        crew = RankGroup(allocation, ranks)
        worker = Worker(
            allocation, timer, reporter, deadline, crew,
            lambda env: AppProcess(settings.app, settings.versions, env),
        )  # fmt: skip
        try:
            worker.serve(settings.idle_timeout_s)
        except Exception as exc:
            reporter.set_state("failed", error=str(exc), fatal=True)
            raise
        finally:
            worker.close()
        # After SIGTERM only the scheduler knows whether the job has ended or is back in the queue.
        reporter.set_state("interrupted" if deadline.interrupted else "closed")


class Worker:
    """Rank 0 of an allocation.

    Parameters
    ----------
    allocation : AllocationDir
    timer : PhaseTimer
    reporter : Reporter
    deadline : Deadline
    crew : RankGroup
        The other ranks.
    start : callable
        Starts a process of the app with an environment.
    """

    def __init__(
        self,
        allocation: AllocationDir,
        timer: PhaseTimer,
        reporter: Reporter,
        deadline: Deadline,
        crew: RankGroup,
        start: Callable[[dict[str, str]], AppProcess],
    ) -> None:
        self._allocation, self._spool = allocation, allocation.spool
        self._timer, self._reporter, self._deadline = timer, reporter, deadline
        self._crew, self._start = crew, start
        self._app: AppProcess | None = None
        self._longest_s, self._served = 0.0, 0

    def serve(self, idle_timeout_s: float) -> None:
        """Answer messages until released, idle for too long, out of walltime or told to end."""
        self._timer.switch_to("load")
        self._reporter.set_state("loading")
        try:
            failure = self._process().load(self._deadline.must_leave)
        except Stopped:
            return
        if failure is not None:
            raise RuntimeError(f"the app cannot be imported in the job: {_words(failure)}")
        self._timer.switch_to("idle")
        self._reporter.set_state("ready")
        inbox = Inbox(
            self._allocation,
            self._spool,
            idle_timeout_s,
            should_stop=lambda: bool(self._deadline.should_stop(self._longest_s)),
        )
        while order_id := inbox.next():
            self._reporter.set_state("running", order_id)
            with self._timer.during("train"):
                if not self._answer(order_id, self._spool.order(order_id)):
                    return
            self._reporter.set_state("ready")

    def close(self) -> None:
        """End the app's processes, and the other ranks."""
        self._drop()
        self._crew.end()

    def _process(self) -> AppProcess:
        if self._app is None:
            self._app = self._start(self._crew.renew())
        return self._app

    def _drop(self) -> None:
        if self._app is not None:
            self._app.end()
            self._app = None

    def _answer(self, order_id: str, order: OrderDir) -> bool:
        """Publish the result of one message; False if it was left for another job."""
        began = time.monotonic()
        order.reply.unlink(missing_ok=True)  # of a try that died before its result
        try:
            failure = self._call(order_id, order)
        except Stopped:
            self._drop()
            return self._leave(order_id, order)
        if failure is not None:
            self._drop()  # nobody knows what state the error left behind
        took = time.monotonic() - began
        self._longest_s, self._served = max(self._longest_s, took), self._served + 1
        order.write_result(Result(order_id, "done", seconds={"train": took}))
        order.request.unlink(missing_ok=True)
        self._process()  # imports the app again while nobody waits
        return True

    def _call(self, order_id: str, order: OrderDir) -> Failure | None:
        """Let the app write the reply; return what went wrong, which is then in the reply."""
        process = self._process()
        self._crew.call(order_id)
        reply = order.reply
        try:
            failure = process.call(
                order.request,
                reply,
                stop=lambda: self._deadline.must_leave() or self._crew.failure(order) is not None,
            )
            if failure is None:
                failure = self._crew.wait(order, self._deadline.must_leave)
            elif reply.exists():  # the app's own error, with the context it left
                return failure
        except Stopped:
            failure = self._crew.failure(order)
            if failure is None or self._deadline.must_leave():
                raise
        if failure is not None:
            save(reply, Reply(failure=failure))
        return failure

    def _leave(self, order_id: str, order: OrderDir) -> bool:
        if not self._deadline.interrupted and not self._served:  # it had the whole job to itself
            error = (
                f"the message needs more than the walltime of {self._deadline.walltime_s:.0f} s. "
                "Give flwr_hpc.batch a longer walltime"
            )
            order.write_result(Result(order_id, "failed", error=error, fatal=True))
        return False


def _words(failure: Failure) -> str:
    """Return the error and where it came from, without the frames of the import system."""
    lines = [line for line in failure.trace.splitlines() if "importlib" not in line]
    return "\n".join([f"{failure.kind}: {failure.text}", *lines[-12:]])
