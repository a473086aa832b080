"""The one clock of the tests: time passes when a test says so."""

from __future__ import annotations

from collections.abc import Callable


class FakeClock:
    """Time that passes in `sleep`, or as `time` is set; what is due then happens.

    Parameters
    ----------
    time : float
        What `now` returns at first.
    epoch : float
        `wall` is ahead of `now` by so much.
    step : float
        Every look at `now` moves the time on by so much.
    """

    def __init__(self, time: float = 0.0, epoch: float = 0.0, step: float = 0.0) -> None:
        self.time, self.epoch, self.step = time, epoch, step
        self.pauses: list[float] = []
        self.at: dict[float, Callable[[], object]] = {}  # moment: what happens once
        self.on_sleep: Callable[[], object] = lambda: None

    def now(self) -> float:
        self.time += self.step
        return self.time

    def wall(self) -> float:
        return self.time + self.epoch

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += seconds
        for moment in sorted(m for m in self.at if m <= self.time):
            self.at.pop(moment)()
        self.on_sleep()
