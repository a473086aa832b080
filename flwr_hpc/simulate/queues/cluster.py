"""A small cluster with other users' jobs and backfill."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from flwr_hpc.errors import UserError
from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.queues.models import Ticket


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
