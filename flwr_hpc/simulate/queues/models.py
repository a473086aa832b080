"""Queues whose waits are drawn, replayed or none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flwr_hpc.errors import UserError
from flwr_hpc.simulate.clock import VirtualClock


@dataclass
class Ticket:
    """A queued job: what it asks for, and what happens when it starts."""

    nodes: int
    walltime_s: float
    start: Callable[[], None]  # Called at the start
    cancelled: bool = False  # Set to leave the queue


class Queue(Protocol):
    """A batch queue."""

    def submit(self, ticket: Ticket) -> None:
        """Queue a job; its `start` is called when its turn has come."""

    def ended(self, ticket: Ticket) -> None:
        """Learn that a job has ended, or has left the queue."""


class NoQueue:
    """Jobs start at once."""

    def submit(self, ticket: Ticket) -> None:
        """Start the job."""
        ticket.start()

    def ended(self, ticket: Ticket) -> None:
        """Do nothing."""


class FirstWaitQueue:
    """The first job waits as in another queue; all later ones start at once.

    Parameters
    ----------
    queue : Queue
        The other one.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue, self._first = queue, True

    def submit(self, ticket: Ticket) -> None:
        """Queue the job, or start it."""
        first, self._first = self._first, False
        self._queue.submit(ticket) if first else ticket.start()

    def ended(self, ticket: Ticket) -> None:
        """Tell the other queue."""
        self._queue.ended(ticket)


class SampledQueue:
    """A queue whose waits are drawn, whoever else is in it."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def submit(self, ticket: Ticket) -> None:
        """Start the job after a wait that is drawn now."""
        self._clock.at(self._clock.now() + self.wait_s(), lambda: _begin(ticket))

    def ended(self, ticket: Ticket) -> None:
        """Do nothing: the waits do not depend on it."""

    def wait_s(self) -> float:
        """Return how long a job waits that is submitted now."""
        raise NotImplementedError


class LognormalQueue(SampledQueue):
    """Lognormal waits; successive ones are alike, as the load of a machine is.

    Parameters
    ----------
    clock : VirtualClock
    median_s : float or callable
        Median wait, or its course: a function of the time.
    sigma : float
        Standard deviation of the wait's logarithm.
    memory_s : float
        The logarithm's autocorrelation falls by 1/e in that time.
    rng : numpy Generator
    """

    def __init__(
        self,
        clock: VirtualClock,
        median_s: float | Callable[[float], float],
        sigma: float,
        memory_s: float,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(clock)
        self._median_s = median_s if callable(median_s) else lambda _: float(median_s)
        self._sigma, self._memory_s, self._rng = sigma, memory_s, rng
        self._level = float(rng.normal())
        self._asked = clock.now()

    def wait_s(self) -> float:
        now = self._clock.now()
        keep = math.exp(-(now - self._asked) / self._memory_s) if self._memory_s > 0 else 0.0
        noise = math.sqrt(1.0 - keep * keep) * float(self._rng.normal())
        self._level, self._asked = keep * self._level + noise, now
        return self._median_s(now) * math.exp(self._sigma * self._level)


class EmpiricalQueue(SampledQueue):
    """Waits that were really seen, in random order: those of the history that runs keep.

    Parameters
    ----------
    clock : VirtualClock
    waits_s : sequence of float
    rng : numpy Generator
    """

    def __init__(
        self, clock: VirtualClock, waits_s: Sequence[float], rng: np.random.Generator
    ) -> None:
        super().__init__(clock)
        if not len(waits_s):
            raise UserError("an empirical queue needs at least one wait; found none")
        self._waits_s, self._rng = np.asarray(waits_s, dtype=float), rng

    def wait_s(self) -> float:
        return float(self._rng.choice(self._waits_s))


class ReplayQueue(SampledQueue):
    """Waits that were really seen, in the order in which they were; then from the first again.

    Parameters
    ----------
    clock : VirtualClock
    waits_s : sequence of float
    """

    def __init__(self, clock: VirtualClock, waits_s: Sequence[float]) -> None:
        super().__init__(clock)
        if not len(waits_s):
            raise UserError("a replayed queue needs at least one wait; found none")
        self._waits = itertools.cycle(float(wait) for wait in waits_s)

    def wait_s(self) -> float:
        return next(self._waits)


def _begin(ticket: Ticket) -> None:
    if not ticket.cancelled:
        ticket.start()
