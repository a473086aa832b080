"""What a worker writes of itself while it works: state, progress, heartbeat."""

from __future__ import annotations

import dataclasses
import faulthandler
import sys
import threading
from contextlib import suppress
from typing import Any

from flwr_hpc.spool import AllocationDir, OrderDir, WorkerState
from flwr_hpc.worker.deadline import Deadline
from flwr_hpc.worker.lifeline import end_process
from flwr_hpc.worker.phase_timer import PhaseTimer
from flwr_hpc.worker.progress_watch import ProgressWatch


class Reporter:
    """Publishes the worker's state, at once when it changes and else every `every_s`.

    A thread does the writing, so that training never waits for the shared file system and the
    heartbeat goes on during long calls. On ranks other than 0 nothing is written.

    Parameters
    ----------
    allocation : AllocationDir or None
        None: write nothing.
    timer : PhaseTimer
    deadline : Deadline
    heartbeat : int
        The last one of an earlier start of this job.
    watch : ProgressWatch or None
        Ends the process when work hangs.
    """

    def __init__(
        self,
        allocation: AllocationDir | None,
        timer: PhaseTimer,
        deadline: Deadline,
        heartbeat: int = 0,
        every_s: float = 1.0,
        watch: ProgressWatch | None = None,
    ) -> None:
        self._allocation = allocation
        self._timer = timer
        self._deadline = deadline
        self._every_s = every_s
        self._watch = watch
        self._state = WorkerState("starting", beat=heartbeat)
        self._progress: tuple[OrderDir, dict[str, Any]] | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="reporter", daemon=True)

    def __enter__(self) -> Reporter:
        if self._allocation:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def set_state(
        self,
        state: Any,
        order_id: str = "",
        error: str = "",
        fatal: bool = False,
        disk: bool = False,
    ) -> None:
        """Publish a new state now, or as soon as the file system takes it."""
        with self._lock:
            self._state = dataclasses.replace(
                self._state, state=state, order_id=order_id, error=error, fatal=fatal, disk=disk
            )
            self._try_to_publish()

    def set_progress(self, folder: OrderDir, progress: dict[str, Any]) -> None:
        """Note how far the running order is; written with the next heartbeat."""
        self._progress = folder, progress

    def progressed(self) -> None:
        """Note that work goes on."""
        if self._watch:
            self._watch.sign()

    def give_up(self, error: str) -> None:
        """Say why and end the process, whatever its other threads wait for."""
        self.set_state("failed", error=error)
        end_process(error)

    def _heartbeat(self) -> None:
        while not self._end.wait(self._every_s):
            with self._lock:
                self._try_to_publish()
            noted, self._progress = self._progress, None
            if noted:
                with suppress(OSError):
                    noted[0].write_progress(noted[1])
            if self._watch and (hang := self._watch.overdue()):
                faulthandler.dump_traceback()
                self.give_up(hang)

    def _try_to_publish(self) -> None:
        try:
            self._publish()
        except OSError as exc:  # a full or stale file system may recover
            print(f"state not written: {exc}", file=sys.stderr, flush=True)

    def _publish(self) -> None:
        if self._allocation is None:
            return
        self._state = dataclasses.replace(
            self._state,
            beat=self._state.beat + 1,
            walltime_left_s=self._deadline.walltime_left(),
            seconds=self._timer.seconds(),
        )
        self._allocation.write_state(self._state)
