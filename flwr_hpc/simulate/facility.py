"""What a simulated facility is like, and what happens there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Facility:
    """What a simulated facility is like; times in seconds."""

    step_s: float  # Of one optimizer step
    nodes: int = 1  # Of an allocation
    startup_s: float = 60.0  # From the job's start to the loaded model
    walltime_s: float = 7200.0  # Of an allocation; to write results, kept back at its end
    write_s: float = 10.0
    # What is kept back if that is more: of one allocation after the other.
    reserves_s: tuple[float, ...] = ()
    # Of the waits, likewise; where there is none: the median of the last waits.
    forecasts_s: tuple[float, ...] = ()
    transfer_s: float = 20.0  # Weights one way; a message one way
    latency_s: float = 2.0
    message_s: float = 0.0  # From a message's arrival until the site acts on it
    # Rates while a job runs: preempted jobs queue again and go on from their checkpoint,
    # failed ones lose what the order had trained.
    preemptions_per_hour: float = 0.0
    failures_per_hour: float = 0.0
    outages: tuple[tuple[float, float], ...] = ()  # The whole site is down
    idle_timeout_s: float = 600.0
    per_round: bool = False  # A job for every order
    max_successors: int = 0  # That may wait in the queue while an allocation lasts
    # An order that the walltime ends returns what it has; else it goes on in the next allocation.
    partial_work: bool = True

    def kept_s(self, allocation: int) -> float:
        """Return what is kept back at the end of the walltime of the n-th allocation."""
        if not self.reserves_s:
            return self.write_s
        return max(self.write_s, self.reserves_s[allocation % len(self.reserves_s)])


@dataclass(frozen=True)
class Segment:
    """A stretch of time of an allocation, for the timeline."""

    allocation: str
    what: Literal["queue", "load", "train", "idle"]
    begin: float
    end: float
