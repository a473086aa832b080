"""When a worker has to end: the walltime, and the scheduler's signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping

from flwr_hpc.worker.ledger import process_start

RESERVED_SHARE = 0.1  # of the walltime, kept for writing until a write was measured
RESERVED_MOST_S = 60.0


class Deadline:
    """Knows how long the worker may go on.

    SIGUSR1 and SIGUSR2 are the scheduler's warning ahead of the walltime's end: there is time
    to finish a step and to write its result. SIGTERM and SIGINT tell of preemption or
    cancellation: there is time for a checkpoint at most, and the same order goes on from it.

    Parameters
    ----------
    end : float or None
        When the job ends, in monotonic seconds; None: not known here.
    reserve_s : float
        Kept for writing, until a write was measured.

    Attributes
    ----------
    interrupted, warned : bool
        Which signals came.
    """

    def __init__(self, end: float | None = None, reserve_s: float = 0.0) -> None:
        self.reserve_s = reserve_s
        self._end = end
        self._interrupted, self._warned = threading.Event(), threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self._interrupted.set())
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, lambda *_: self._warned.set())

    @classmethod
    def detect(cls, walltime_s: float | None, env: Mapping[str, str] = os.environ) -> Deadline:
        """Find out when this job ends; to be called on rank 0, whose clock decides for all.

        ``FLWR_HPC_WALLTIME_S`` counts from the job's start and wins over `walltime_s`, what
        was asked for; ``FLWR_HPC_END_S`` is the scheduler's own end, in Unix seconds. The
        earlier of both holds.
        """
        granted = env.get("FLWR_HPC_WALLTIME_S")
        length = float(granted) if granted else walltime_s
        ends = [] if length is None else [process_start() + length]
        end = _told(env.get("FLWR_HPC_END_S"))
        if end is not None:
            ends.append(end)
        left = min(ends) - process_start() if ends else 0.0
        return cls(min(ends, default=None), min(RESERVED_MOST_S, RESERVED_SHARE * left))

    @property
    def interrupted(self) -> bool:
        return self._interrupted.is_set()

    @property
    def warned(self) -> bool:
        return self._warned.is_set()

    def walltime_left(self) -> float | None:
        """Return the seconds until the job ends, None if that is not known."""
        return None if self._end is None else self._end - time.monotonic()

    def is_due(self, next_s: float = 0.0) -> bool:
        """Tell whether `next_s` more seconds of work would leave too little time to write."""
        left = self.walltime_left()
        return self.warned or (left is not None and left < self.reserve_s + next_s)


def _told(end_s: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Return the scheduler's end in monotonic seconds; None if it gave none that makes sense."""
    left = float(end_s) - now() if end_s else 0.0
    return time.monotonic() + left if left > 0 else None  # else: the clocks disagree
