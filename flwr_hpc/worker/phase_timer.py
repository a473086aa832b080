"""Where an allocation's time went, on the worker's own monotonic clock."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from flwr_hpc.clock import Clock, SystemClock

PHASES = ("startup", "load", "train", "evaluate", "transfer", "idle")
EMPTY: Mapping[str, float] = MappingProxyType({})


class PhaseTimer:
    """Seconds by phase; at any moment exactly one phase is running.

    The time from the start of the process to the first switch is ``startup``.

    Parameters
    ----------
    before : mapping of str to float
        Seconds of earlier starts of this job.
    clock : Clock

    Attributes
    ----------
    switches : int
        How often the phase has changed.
    """

    def __init__(self, before: Mapping[str, float] = EMPTY, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._since = process_start(self._clock)
        self._phase, self.switches = "startup", 0
        self._seconds = {phase: before.get(phase, 0.0) for phase in PHASES}

    def switch_to(self, phase: str) -> None:
        """End the running phase and begin another."""
        now = self._clock.now()
        self._seconds[self._phase] += max(0.0, now - self._since)
        self._phase, self._since = phase, now
        self.switches += 1

    @property
    def phase(self) -> str:
        return self._phase

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the body as `phase`, then go back to the phase before."""
        before = self._phase
        self.switch_to(phase)
        try:
            yield
        finally:
            self.switch_to(before)

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far, the running phase included."""
        # Read from the reporter's thread: a copy first, so that a switch cannot tear it.
        seconds, phase, since = dict(self._seconds), self._phase, self._since
        seconds[phase] += max(0.0, self._clock.now() - since)
        return {name: round(value, 4) for name, value in seconds.items()}


def process_start(clock: Clock) -> float:
    """Return when this interpreter was started, on `clock`.

    ``FLWR_HPC_T0`` (monotonic seconds of this host) wins, then ``/proc``; elsewhere: now.
    """
    if given := os.environ.get("FLWR_HPC_T0"):
        return min(float(given), clock.now())
    try:
        # Field 22 of stat; the process name before it may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return clock.now()
    return clock.now() - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
