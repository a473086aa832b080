"""Virtual time: what happens is an event in a heap, and waiting costs nothing."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable


class HorizonReached(Exception):
    """The simulated time is up."""


class VirtualClock:
    """A clock that runs events as it is told to sleep.

    Parameters
    ----------
    horizon_s : float
        Sleeping beyond it raises `HorizonReached`.
    start_s : float
        What `now` returns at first.
    """

    def __init__(self, horizon_s: float = math.inf, start_s: float = 0.0) -> None:
        self.horizon_s = horizon_s
        self._now = start_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def now(self) -> float:
        """Return the seconds since the simulation began."""
        return self._now

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Have something happen at a time; in the past means now, in the order of calls."""
        heapq.heappush(self._events, (max(when, self._now), next(self._count), call))

    def sleep(self, seconds: float) -> None:
        """Run the events of the next `seconds`; with none in them, on to the first one after.

        Whoever sleeps polls: nothing can change before that event, so the polls in between
        need not be played.
        """
        until = self._now + seconds
        if self._events and self._events[0][0] > until:
            until = self._events[0][0]
        if until > self.horizon_s:
            raise HorizonReached(f"the simulation ended after {self.horizon_s:.0f} s")
        self.advance(until)

    def advance(self, until: float) -> None:
        """Run all events up to a time, which is then the present."""
        while self._events and self._events[0][0] <= until:
            self._now, _, call = heapq.heappop(self._events)
            call()
        self._now = until

    def hand_over(self, other: VirtualClock) -> None:
        """Leave the events that have not happened yet to another clock."""
        for when, _, call in sorted(self._events, key=lambda e: e[:2]):
            other.at(when, call)
        self._events.clear()
