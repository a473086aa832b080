"""Whether work that makes no progress still may, by what it took before."""

from __future__ import annotations

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.worker.phase_timer import PhaseTimer

FACTOR = 10.0  # times the longest step, evaluation or write before
COLD_FACTOR = 6.0  # times the floor, while nothing is measured: compilation, first step
AWAKE_S = 10.0  # longer between two looks, and the process was suspended
UNLIMITED = ("startup", "load")  # what is fetched, and from where, nobody knows


class ProgressWatch:
    """Counts how long rank 0 has stood still; a hang on another rank holds it up as well.

    A step of training and a change of phase are progress; so is each look of an idle worker into
    its inbox.

    Parameters
    ----------
    timer : PhaseTimer
    floor_s : float
        No shorter stand-still is a hang; 0: none ever is.
    clock : Clock
    """

    def __init__(self, timer: PhaseTimer, floor_s: float, clock: Clock | None = None) -> None:
        self._timer, self._floor_s = timer, floor_s
        self._clock = clock or SystemClock()
        self._looked_at = self._clock.now()
        self._signs = 0
        self._seen = (timer.switches, 0)
        self._phase, self._still_s = timer.phase, 0.0
        self._begun: set[str] = set()  # the first step of a phase is like no other
        self._longest: dict[str, float] = {}

    def sign(self) -> None:
        """Note progress."""
        self._signs += 1

    def overdue(self) -> str:
        """Say what has stood still for too long, if so; called about once a second."""
        now = self._clock.now()
        passed_s, self._looked_at = min(now - self._looked_at, AWAKE_S), now
        self._still_s += passed_s
        seen = (self._timer.switches, self._signs)
        if seen != self._seen:
            self._measure()
            self._seen, self._phase, self._still_s = seen, self._timer.phase, 0.0
        limit_s = self._limit_s()
        if self._floor_s <= 0 or self._still_s <= limit_s:
            return ""
        return (
            f"no progress for {self._still_s:.0f} s ({self._phase}; at most {limit_s:.0f} s by "
            "what it took before): the allocation hangs"
        )

    def _measure(self) -> None:
        if self._phase in self._begun:
            longest_s = self._longest.get(self._phase, 0.0)
            self._longest[self._phase] = max(longest_s, self._still_s)
        self._begun.add(self._phase)

    def _limit_s(self) -> float:
        if self._phase in UNLIMITED:
            return float("inf")
        if self._phase not in self._longest:
            return COLD_FACTOR * self._floor_s
        return max(self._floor_s, FACTOR * self._longest[self._phase])
