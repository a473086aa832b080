"""What a facility did when: intervals without gaps or overlaps, on the server's clock.

The edges of what the server saw (an order sent, an order done, an allocation queued or ready)
are times of the server's clock. What happened between two edges comes as durations from the
facility and is laid between them; if the durations do not fit, they are scaled. So times of
two hosts are never subtracted from each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Interval = tuple[float, float, str]  # start and end in seconds of the run, phase

PHASES = ("queue", "startup", "load", "train", "evaluate", "transfer", "idle")
ACQUIRING = ("queue", "startup", "load")
MOST = 20_000  # intervals kept; beyond, the older half is told more coarsely
GROUP = 40


@dataclass
class Timeline:
    """Contiguous intervals from the run's start; only the end is ever written again."""

    intervals: list[Interval] = field(default_factory=list)
    end_s: float = 0.0

    def extend(self, until_s: float, phase: str) -> None:
        """Continue with `phase` up to `until_s`; nothing if that is already past."""
        if until_s <= self.end_s:
            return
        start = self.end_s
        if self.intervals and self.intervals[-1][2] == phase:
            start = self.intervals.pop()[0]
        self.intervals.append((start, until_s, phase))
        self.end_s = until_s
        if len(self.intervals) > MOST:
            self._coarsen()

    def relay(self, start_s: float, end_s: float, parts: Iterable[tuple[str, float]]) -> None:
        """Replace what lies from `start_s` to `end_s` by parts in proportion to their seconds."""
        laid = [(phase, seconds) for phase, seconds in parts if seconds > 0]
        total = sum(seconds for _, seconds in laid)
        if end_s <= start_s or total <= 0:
            return
        after = self._cut(end_s)
        self._cut(start_s)
        spent = 0.0
        for phase, seconds in laid:
            spent += seconds
            self.extend(start_s + (end_s - start_s) * min(1.0, spent / total), phase)
        for _, until_s, phase in after:
            self.extend(until_s, phase)

    def _coarsen(self) -> None:
        """Merge the older half by groups into the sums of their phases."""
        old, self.intervals = self.intervals[: MOST // 2], self.intervals[MOST // 2 :]
        merged: list[Interval] = []
        for i in range(0, len(old), GROUP):
            group = old[i : i + GROUP]
            at = group[0][0]
            sums = [(phase, s) for phase, s in totals(group).items() if s > 0]
            for phase, seconds in sums:
                until = group[-1][1] if phase == sums[-1][0] else at + seconds
                merged.append((at, until, phase))
                at = until
        self.intervals = merged + self.intervals

    def _cut(self, at_s: float) -> list[Interval]:
        """Take away and return what lies after `at_s`."""
        after: list[Interval] = []
        while self.intervals and self.intervals[-1][1] > at_s:
            start, end, phase = self.intervals.pop()
            after.append((max(start, at_s), end, phase))
            if start < at_s:
                self.intervals.append((start, at_s, phase))
        self.end_s = min(self.end_s, at_s)
        return after[::-1]


def order_parts(
    seconds: Mapping[str, float], acquiring: Mapping[str, float], window_s: float
) -> list[tuple[str, float]]:
    """Return the phases of one order's round trip in their order in time.

    Parameters
    ----------
    seconds : dict of str to float
        The worker's durations: ``read``, ``evaluate``, ``train``, ``write``.
    acquiring : dict of str to float
        Seconds in queue, startup and load that fall into this round trip.
    window_s : float
        The round trip on the server's clock; what nobody accounts for is transfer, half of it
        before the work and half after.
    """
    if not any(seconds.get(k) for k in ("read", "train", "evaluate", "write")):
        work = max(0.0, window_s - sum(acquiring.values()))
        seconds = {"train": work}  # a client of somebody else's tells no durations
    known = sum(seconds.get(k, 0.0) for k in ("read", "train", "evaluate", "write"))
    rest = max(0.0, window_s - known - sum(acquiring.values()))
    return [
        *((phase, acquiring.get(phase, 0.0)) for phase in ACQUIRING),
        ("transfer", seconds.get("read", 0.0) + rest / 2),
        ("evaluate", seconds.get("evaluate", 0.0)),
        ("train", seconds.get("train", 0.0)),
        ("transfer", seconds.get("write", 0.0) + rest / 2),
    ]


def totals(intervals: Iterable[Interval]) -> dict[str, float]:
    """Return the seconds of each phase."""
    found = dict.fromkeys(PHASES, 0.0)
    for start, end, phase in intervals:
        found[phase] += end - start
    return found
