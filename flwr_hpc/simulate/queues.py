"""How long a simulated job waits: batch queues as models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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


class _Sampled:
    """A queue whose waits are drawn, whoever else is in it."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def submit(self, ticket: Ticket) -> None:
        """Start the job after a wait that is drawn now."""
        self._clock.at(self._clock.now() + self._wait_s(), lambda: _begin(ticket))

    def ended(self, ticket: Ticket) -> None:
        """Do nothing: the waits do not depend on it."""

    def _wait_s(self) -> float:
        raise NotImplementedError


class LognormalQueue(_Sampled):
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

    def _wait_s(self) -> float:
        now = self._clock.now()
        keep = math.exp(-(now - self._asked) / self._memory_s) if self._memory_s > 0 else 0.0
        noise = math.sqrt(1.0 - keep * keep) * float(self._rng.normal())
        self._level, self._asked = keep * self._level + noise, now
        return self._median_s(now) * math.exp(self._sigma * self._level)


class EmpiricalQueue(_Sampled):
    """Waits that were really seen: of a trace, or of the history that runs keep.

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

    def _wait_s(self) -> float:
        return float(self._rng.choice(self._waits_s))


class ReplayQueue(_Sampled):
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

    def _wait_s(self) -> float:
        return next(self._waits)


def waits_of_trace(path: Path, nodes: int, walltime_s: float) -> list[float]:
    """Return the waits of similar jobs in a Standard Workload Format trace.

    Similar: between a third and three times the processors and the requested time. Columns 3
    (wait), 8 (requested processors) and 9 (requested time) of
    https://www.cs.huji.ac.il/labs/parallel/workload/swf.html are read; -1 means not known.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as exc:
        raise UserError(f"cannot read the trace {path}: {exc.strerror}") from None
    waits = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith(";"):
            continue
        fields = line.split()
        try:
            wait, processors, asked = (float(fields[i]) for i in (2, 7, 8))
        except (IndexError, ValueError):
            raise UserError(
                f"{path}, line {number}: not a line of the Standard Workload Format (18 numbers): "
                f"{line[:60]!r}"
            ) from None
        if wait >= 0 and _similar(processors, nodes) and _similar(asked, walltime_s):
            waits.append(wait)
    if not waits:
        raise UserError(
            f"{path}: no job with about {nodes} processors and {walltime_s:.0f} s. Name another "
            "trace, nodes or walltime"
        )
    return waits


def _similar(found: float, wanted: float) -> bool:
    return found < 0 or wanted / 3 <= found <= wanted * 3


@dataclass
class _Running:
    ticket: Ticket
    ends: float  # at its walltime, as the scheduler has to assume


@dataclass
class BackfillCluster:
    """A small cluster with other users' jobs: first come, first served with EASY backfill.

    A job behind the first one in the queue may start early if, by the walltimes asked for, it
    does not delay that first one.
    """

    clock: VirtualClock
    nodes: int
    load: float  # Offered load of the other users' jobs, as a share of the cluster
    # Of other users' jobs (geometric; lognormal); they ask for two to four times their
    # runtime.
    mean_nodes: float
    mean_runtime_s: float
    rng: np.random.Generator
    warmup_s: float = 0.0  # Other users' jobs arrived for so long before the simulation began
    _queue: list[Ticket] = field(default_factory=list)
    _running: list[_Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        work = self.mean_nodes * self.mean_runtime_s
        self._gap_s = work / (self.load * self.nodes)
        present = self.clock
        self.clock = past = VirtualClock(start_s=present.now() - self.warmup_s)
        self._arrive()
        past.advance(present.now())
        past.hand_over(present)
        self.clock = present

    def submit(self, ticket: Ticket) -> None:
        """Queue a job."""
        self._queue.append(ticket)
        self._schedule()

    def ended(self, ticket: Ticket) -> None:
        """Free a job's nodes."""
        self._running = [r for r in self._running if r.ticket is not ticket]
        self._schedule()

    def _arrive(self) -> None:
        self._other()
        gap = float(self.rng.exponential(self._gap_s))
        self.clock.at(self.clock.now() + gap, self._arrive)

    def _other(self) -> None:
        size = min(self.nodes, int(self.rng.geometric(1.0 / self.mean_nodes)))
        runs = float(self.rng.lognormal(math.log(self.mean_runtime_s) - 0.5, 1.0))
        ticket = Ticket(size, runs * float(self.rng.uniform(2.0, 4.0)), start=lambda: None)
        ticket.start = lambda: self.clock.at(self.clock.now() + runs, lambda: self.ended(ticket))
        self.submit(ticket)

    def _schedule(self) -> None:
        self._queue = [t for t in self._queue if not t.cancelled]
        while self._queue and self._queue[0].nodes <= self._free():
            self._start(self._queue.pop(0))
        if not self._queue:
            return
        shadow, spare = self._reservation(self._queue[0].nodes)
        now = self.clock.now()
        for ticket in list(self._queue[1:]):
            if ticket.nodes > self._free():
                continue
            if now + ticket.walltime_s <= shadow:
                pass  # gone before the first one can start
            elif ticket.nodes <= spare:
                spare -= ticket.nodes
            else:
                continue
            self._queue.remove(ticket)
            self._start(ticket)

    def _free(self) -> int:
        return self.nodes - sum(r.ticket.nodes for r in self._running)

    def _reservation(self, wanted: int) -> tuple[float, int]:
        """Return when the first job can start at the latest, and what is free beside it then."""
        free = self._free()
        for running in sorted(self._running, key=lambda r: r.ends):
            free += running.ticket.nodes
            if free >= wanted:
                return running.ends, free - wanted
        raise UserError(f"a job of {wanted} nodes never fits a cluster of {self.nodes}")

    def _start(self, ticket: Ticket) -> None:
        self._running.append(_Running(ticket, self.clock.now() + ticket.walltime_s))
        self.clock.at(self.clock.now(), lambda: self._begin(ticket))

    def _begin(self, ticket: Ticket) -> None:
        if ticket.cancelled:  # since its nodes were given to it
            self.ended(ticket)
        else:
            ticket.start()


def _begin(ticket: Ticket) -> None:
    if not ticket.cancelled:
        ticket.start()
