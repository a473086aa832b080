"""Where an allocation's time went, on the worker's own monotonic clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

PHASES = ("startup", "load", "train", "evaluate", "transfer", "idle")
EMPTY: Mapping[str, float] = MappingProxyType({})


class PhaseTimer:
    """Seconds by phase; at any moment exactly one phase is running.

    Parameters
    ----------
    start : float
        When the process began, on `clock`; the time up to the first switch is ``startup``.
    before : mapping of str to float
        Seconds of earlier starts of this job.
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self,
        start: float,
        before: Mapping[str, float] = EMPTY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._since = start
        self._phase = "startup"
        self._seconds = {phase: before.get(phase, 0.0) for phase in PHASES}

    def switch(self, phase: str) -> float:
        """End the running phase, begin `phase`; return how long the ended one ran, in s."""
        now = self._clock()
        ran = max(0.0, now - self._since)
        self._seconds[self._phase] += ran
        self._phase, self._since = phase, now
        return ran

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the body as `name`, then go back to the phase before."""
        before = self._phase
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far, the running phase included."""
        # Read from the reporter's thread: a copy first, so that a switch cannot tear it.
        seconds, phase, since = dict(self._seconds), self._phase, self._since
        seconds[phase] += max(0.0, self._clock() - since)
        return {name: round(value, 4) for name, value in seconds.items()}


def process_start(clock: Callable[[], float] = time.monotonic) -> float:
    """Return when this interpreter was started, on `clock`.

    ``FLWR_HPC_T0`` (monotonic seconds of this host) wins, then ``/proc``; elsewhere: now.
    """
    if given := os.environ.get("FLWR_HPC_T0"):
        return min(float(given), clock())
    try:
        # Field 22 of stat; the process name before it may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return clock()
    return clock() - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
