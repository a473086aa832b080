"""Runs in the batch job: takes message after message from the inbox until it is time to end.

The rank's own process imports neither the app nor torch; see `flwr_hpc.batch_mod.process`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr_hpc.batch_mod.app import AppRef
from flwr_hpc.batch_mod.carry import REPLY, REQUEST, Failure, Reply, save
from flwr_hpc.batch_mod.crew import RankGroup, follow
from flwr_hpc.batch_mod.process import AppProcess, Stopped
from flwr_hpc.protocol import Result
from flwr_hpc.spool import AllocationDir, OrderDir, Spool
from flwr_hpc.worker.inbox import Inbox
from flwr_hpc.worker.ledger import PhaseTimer, process_start
from flwr_hpc.worker.ranks import Ranks
from flwr_hpc.worker.reporter import Reporter

RESERVED_SHARE, RESERVED_MOST_S = 0.1, 10.0  # of the walltime, to write and to leave in order


def run(allocation_dir: str) -> None:
    """Serve an allocation; called once in every rank.

    Raises
    ------
    RuntimeError
        If the app cannot be imported.
    """
    allocation, ranks = AllocationDir(Path(allocation_dir)), Ranks.detect()
    spec = allocation.settings()
    app = AppRef(spec["app_folder"], spec["app"])
    ending = Deadline(float(os.environ["FLWR_HPC_WALLTIME_S"]))
    if ranks.rank > 0:
        follow(allocation, ranks, app, spec["versions"], ending.now)
        return
    ledger = PhaseTimer(process_start())
    with Reporter(allocation, ledger, ending.left) as reporter:
        reporter.say("starting")
        crew = RankGroup(allocation, ranks)
        worker = Worker(
            allocation, ledger, reporter, ending, crew,
            lambda env: AppProcess(app, spec["versions"], env),
        )  # fmt: skip
        try:
            worker.serve(float(spec["idle_timeout_s"]))
        except Exception as exc:
            reporter.say("failed", error=str(exc), fatal=True)
            raise
        finally:
            worker.close()
        # After SIGTERM only the scheduler knows whether the job has ended or is back in the queue.
        reporter.say("interrupted" if ending.told else "closed")


class Deadline:
    """Knows when to take no more messages, and when to leave the one at hand."""

    def __init__(self, walltime_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self.walltime_s = clock, walltime_s
        self._end = process_start(clock) + walltime_s
        left = float(os.environ.get("FLWR_HPC_END_S") or 0) - time.time()
        if left > 0:  # the scheduler may have granted less
            self._end = min(self._end, clock() + left)
        self._reserve_s = min(RESERVED_MOST_S, RESERVED_SHARE * walltime_s)
        self._warned = self.told = False
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # ahead of the walltime
            signal.signal(number, self._warn)
        for number in (signal.SIGTERM, signal.SIGINT):  # cancelled or preempted
            signal.signal(number, self._tell)

    def left(self) -> float:
        """Return the seconds of walltime left."""
        return self._end - self._clock()

    def no_more(self, next_s: float) -> bool:
        """Whether a message of `next_s` seconds should rather go to the next job."""
        return self._warned or self.now() or self.left() < self._reserve_s + next_s

    def now(self) -> bool:
        """Whether even the message at hand must be left: a signal, or the walltime."""
        return self.told or self.left() < self._reserve_s / 2

    def _warn(self, *_: Any) -> None:
        self._warned = True

    def _tell(self, *_: Any) -> None:
        self.told = True


class Worker:
    """Rank 0 of an allocation.

    Parameters
    ----------
    allocation : AllocationDir
    ledger : PhaseTimer
    reporter : Reporter
    ending : Deadline
    crew : RankGroup
        The other ranks.
    start : callable
        Starts a process of the app with an environment.
    """

    def __init__(
        self,
        allocation: AllocationDir,
        ledger: PhaseTimer,
        reporter: Reporter,
        ending: Deadline,
        crew: RankGroup,
        start: Callable[[dict[str, str]], AppProcess],
    ) -> None:
        self._allocation, self._spool = allocation, Spool(allocation.path.parents[1])
        self._ledger, self._reporter, self._ending = ledger, reporter, ending
        self._crew, self._start = crew, start
        self._app: AppProcess | None = None
        self._longest_s, self._served = 0.0, 0

    def serve(self, idle_timeout_s: float) -> None:
        """Answer messages until released, idle for too long, out of walltime or told to end."""
        self._ledger.switch("load")
        self._reporter.say("loading")
        try:
            failure = self._process().load(self._ending.now)
        except Stopped:
            return
        if failure is not None:
            raise RuntimeError(f"the app cannot be imported in the job: {_words(failure)}")
        self._ledger.switch("idle")
        self._reporter.say("ready")
        inbox = Inbox(
            self._allocation,
            self._spool,
            idle_timeout_s,
            should_stop=lambda: self._ending.no_more(self._longest_s),
        )
        while order_id := inbox.next():
            self._reporter.say("running", order_id)
            with self._ledger.phase("train"):
                if not self._answer(order_id, self._spool.order(order_id)):
                    return
            self._reporter.say("ready")

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
        (order.path / REPLY).unlink(missing_ok=True)  # of a try that died before its result
        try:
            failure = self._call(order_id, order.path)
        except Stopped:
            self._drop()
            return self._leave(order_id, order)
        if failure is not None:
            self._drop()  # nobody knows what state the error left behind
        took = time.monotonic() - began
        self._longest_s, self._served = max(self._longest_s, took), self._served + 1
        order.write_result(Result(order_id, "done", seconds={"train": took}))
        (order.path / REQUEST).unlink(missing_ok=True)
        self._process()  # imports the app again while nobody waits
        return True

    def _call(self, order_id: str, order: Path) -> Failure | None:
        """Let the app write the reply; return what went wrong, which is then in the reply."""
        process = self._process()
        self._crew.call(order_id)
        reply = order / REPLY
        try:
            failure = process.call(
                order / REQUEST,
                reply,
                stop=lambda: self._ending.now() or self._crew.failure(order) is not None,
            )
            if failure is None:
                failure = self._crew.wait(order, self._ending.now)
            elif reply.exists():  # the app's own error, with the context it left
                return failure
        except Stopped:
            failure = self._crew.failure(order)
            if failure is None or self._ending.now():
                raise
        if failure is not None:
            save(reply, Reply(failure=failure))
        return failure

    def _leave(self, order_id: str, order: OrderDir) -> bool:
        if not self._ending.told and not self._served:  # it had the whole job to itself
            error = (
                f"the message needs more than the walltime of {self._ending.walltime_s:.0f} s. "
                "Give flwr_hpc.batch a longer walltime"
            )
            order.write_result(Result(order_id, "failed", error=error, fatal=True))
        return False


def _words(failure: Failure) -> str:
    """Return the error and where it came from, without the frames of the import system."""
    lines = [line for line in failure.trace.splitlines() if "importlib" not in line]
    return "\n".join([f"{failure.kind}: {failure.text}", *lines[-12:]])
