"""When a worker has to stop: the walltime, and the scheduler's signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from enum import IntEnum

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.worker.phase_timer import process_start

RESERVED_SHARE = 0.1  # of the walltime, kept for writing until a write was measured
RESERVED_MOST_S = 60.0


class Stop(IntEnum):
    """Whether work has to stop; the greater, the less time is left. ``NO`` is false."""

    NO = 0
    FINISH = 1  # The walltime is about over: end in order, with what is done
    LEAVE = 2  # Preempted or cancelled: there is time for a checkpoint at most


class Deadline:
    """Knows how long the worker may go on.

    SIGUSR1 and SIGUSR2 are the scheduler's warning ahead of the walltime's end: there is time
    to finish a step and to write its result. SIGTERM and SIGINT tell of preemption or
    cancellation: there is time for a checkpoint at most, and the same order goes on from it.

    Parameters
    ----------
    walltime_s : float or None
        Until the job ends, from its start; None: not known here.
    reserve_s : float
        Kept for writing, until a write was measured.
    clock : Clock

    Attributes
    ----------
    interrupted, warned : bool
        Which signals came.
    """

    def __init__(
        self,
        walltime_s: float | None = None,
        reserve_s: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self.walltime_s, self.reserve_s = walltime_s, reserve_s
        self._start = process_start(self._clock)
        self._interrupted, self._warned = threading.Event(), threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self._interrupted.set())
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, lambda *_: self._warned.set())

    @classmethod
    def detect(
        cls,
        walltime_s: float | None = None,
        env: Mapping[str, str] = os.environ,
        reserve_most_s: float = RESERVED_MOST_S,
        clock: Clock | None = None,
    ) -> Deadline:
        """Find out when this job ends; to be called on rank 0, whose clock decides for all.

        ``FLWR_HPC_WALLTIME_S`` counts from the job's start and wins over `walltime_s`, what
        was asked for; ``FLWR_HPC_END_S`` is the scheduler's own end, in Unix seconds. The
        earlier of both holds.
        """
        clock = clock or SystemClock()
        if granted := env.get("FLWR_HPC_WALLTIME_S"):
            walltime_s = float(granted)
        left = float(env.get("FLWR_HPC_END_S") or 0) - clock.wall()
        if left > 0:  # else: the scheduler gave none, or the clocks disagree
            length = clock.now() + left - process_start(clock)
            walltime_s = length if walltime_s is None else min(walltime_s, length)
        reserve_s = min(reserve_most_s, RESERVED_SHARE * (walltime_s or 0.0))
        return cls(walltime_s, reserve_s, clock)

    @property
    def interrupted(self) -> bool:
        return self._interrupted.is_set()

    @property
    def warned(self) -> bool:
        return self._warned.is_set()

    def walltime_left(self) -> float | None:
        """Return the seconds until the job ends, None if that is not known."""
        if self.walltime_s is None:
            return None
        return self._start + self.walltime_s - self._clock.now()

    def should_stop(self, next_s: float = 0.0) -> Stop:
        """Say whether `next_s` more seconds of work would leave too little time to write."""
        if self.interrupted:
            return Stop.LEAVE
        left = self.walltime_left()
        if self.warned or (left is not None and left < self.reserve_s + next_s):
            return Stop.FINISH
        return Stop.NO

    def must_leave(self) -> bool:
        """Say whether even the work at hand must be left: a signal, or the walltime."""
        left = self.walltime_left()
        return self.interrupted or (left is not None and left < self.reserve_s / 2)
