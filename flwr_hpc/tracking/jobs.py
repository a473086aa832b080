"""What the log tells of one allocation's job: when it waited and ran, and what that cost.

Times are the scheduler's own, in Unix seconds, and durations differences of two of them; what
a job did while it ran comes from its worker's ledger. A job that was put back in the queue has
a *queue cycle* for every start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TIMES = ("submitted_s", "eligible_s", "started_s", "ended_s")
WORK = ("train", "evaluate")


@dataclass
class QueueCycle:
    """Once through the queue and what came of it; what is not known is None."""

    submitted_s: float | None = None
    eligible_s: float | None = None
    started_s: float | None = None
    ended_s: float | None = None

    @property
    def queue_s(self) -> float | None:
        """Return how long the job waited, None while it does."""
        if self.submitted_s is None or self.started_s is None:
            return None
        return max(0.0, self.started_s - self.submitted_s)

    @property
    def run_s(self) -> float | None:
        """Return how long the job ran, None while it does."""
        if self.started_s is None or self.ended_s is None:
            return None
        return max(0.0, self.ended_s - self.started_s)


@dataclass
class Job:
    """One allocation's job."""

    name: str
    id: str = ""
    nodes: int = 1
    # How it ended, in the words of `flwr_hpc.schedulers.base.Outcome`; empty before that, and
    # if nobody knows.
    outcome: str = ""
    restarts: int = 0
    cycles: list[QueueCycle] = field(default_factory=list)
    queue_s: float = 0.0  # Seconds in the queue by the facility's account, over all cycles
    # Seconds by phase of each worker, on its own clock: one for every cycle that got so far.
    workers: list[dict[str, float]] = field(default_factory=list)
    # Work (training and evaluation) up to the last order that was finished, in seconds.
    saved_s: float = 0.0
    counted: int = 0  # Ends for which lost work has been counted
    before: str = ""  # The allocation that worked before this one
    placed: dict[str, float] = field(default_factory=dict)  # What of its waiting is on the timeline

    @property
    def requeued(self) -> bool:
        """Whether it waits for another start."""
        return 0 < len(self.cycles) <= self.restarts and not self.outcome

    @property
    def ended(self) -> bool:
        """Whether it is over for good."""
        over = bool(self.cycles) and self.cycles[-1].ended_s is not None
        return bool(self.outcome) or (over and not self.requeued)

    @property
    def pending(self) -> bool:
        """Whether it waits in the queue, as far as the scheduler told."""
        waits = bool(self.cycles) and self.cycles[-1].started_s is None
        return self.requeued or (waits and not self.ended)

    @property
    def bad_ends(self) -> int:
        """How often it was put back in the queue, or ended otherwise than completed."""
        requeued = max(0, len(self.cycles) - 1, self.restarts)
        return requeued + (self.ended and self.outcome != "completed")

    @property
    def work_s(self) -> float:
        """Return the seconds of training and evaluation of all its workers."""
        return sum(w.get(p, 0.0) for w in self.workers for p in WORK)

    @property
    def unsaved_s(self) -> float:
        """Return the work since its last finished order."""
        return max(0.0, self.work_s - self.saved_s)

    @property
    def waits(self) -> list[float]:
        """Return the seconds in the queue before every start."""
        return [s.queue_s for s in self.cycles if s.queue_s is not None]

    def seconds(self) -> dict[str, float]:
        """Return seconds by phase over all its cycles."""
        phases = {p for w in self.workers for p in w}
        return {"queue": self.queue_s} | {
            p: sum(w.get(p, 0.0) for w in self.workers) for p in sorted(phases)
        }

    def worker(self, cycle: int) -> dict[str, float]:
        """Return the ledger of the worker of a cycle.

        They match from the last start on: an earlier one may have ended before it said anything.
        """
        starts = sum(s.started_s is not None for s in self.cycles)
        i = cycle - starts + len(self.workers)
        return self.workers[i] if 0 <= i < len(self.workers) else {}

    def account(self, ledger: Mapping[str, float]) -> None:
        """Take in the ledger; one that went back is that of a new worker, after a requeue."""
        worker = {p: s for p, s in ledger.items() if p != "queue"}
        self.queue_s = ledger.get("queue", self.queue_s)
        last = self.workers[-1] if self.workers else {}
        if not self.workers or any(worker.get(p, 0.0) < s - 1e-3 for p, s in last.items()):
            self.workers.append(worker)
        else:
            self.workers[-1] = worker

    def update(self, said: Mapping[str, Any]) -> None:
        """Take in what the scheduler said; an entry may hold one cycle, or a list of them."""
        self.id = str(said.get("id") or self.id)
        nodes = _number(said.get("nodes"))
        self.nodes = max(1, int(nodes)) if nodes is not None else self.nodes
        self.outcome = str(said.get("outcome") or "")
        self.restarts = int(_number(said.get("restarts")) or 0)
        cycles = said.get("cycles")
        told = [s for s in cycles if isinstance(s, dict)] if isinstance(cycles, list) else []
        for one in [*told, said]:
            cycle = QueueCycle(*(_number(one.get(key)) for key in TIMES))
            if cycle.submitted_s is not None or cycle.started_s is not None:
                self._keep(cycle)

    def _keep(self, new: QueueCycle) -> None:
        for i, old in enumerate(self.cycles):
            same_start = new.started_s is not None and old.started_s == new.started_s
            if same_start or (i == len(self.cycles) - 1 and old.started_s is None):
                new.ended_s = old.ended_s if new.ended_s is None else new.ended_s
                self.cycles[i] = new
                return
        if self.cycles and self.cycles[-1].ended_s is None and new.submitted_s is not None:
            # Put back in the queue: the new cycle begins where the one before ended.
            started = self.cycles[-1].started_s
            if started is not None and new.submitted_s >= started:
                self.cycles[-1].ended_s = new.submitted_s
        self.cycles.append(new)

    def used(self) -> tuple[float, float]:
        """Return node-seconds used, and how much of them only the ledger tells.

        The nodes of the job times how long the scheduler says it ran; a cycle whose start or
        end it does not tell counts as long as its worker's ledger.
        """
        told = sum(cycle.run_s or 0.0 for cycle in self.cycles)
        matched = [self.worker(i) for i, cycle in enumerate(self.cycles) if cycle.run_s is not None]
        ledger = sum(sum(w.values()) for w in self.workers if all(w is not m for m in matched))
        return (told + ledger) * self.nodes, ledger * self.nodes

    def idle(self) -> float:
        """Return the node-seconds in which it ran and had nothing to do."""
        return sum(w.get("idle", 0.0) for w in self.workers) * self.nodes

    def newly_lost(self) -> float:
        """Return node-seconds of work that its end has cost, each counted once.

        That is what its workers trained and evaluated after their last finished order, if the
        job was put back in the queue or ended otherwise than completed.
        """
        badly = self.ended and self.outcome != "completed"
        if self.bad_ends <= self.counted and not badly:
            return 0.0
        self.counted = self.bad_ends
        lost, self.saved_s = self.unsaved_s, self.work_s
        return lost * self.nodes


def order_of(name: str) -> tuple[int, str]:
    """Return the sort key of allocation names: ``a9999`` comes before ``a10000``."""
    return len(name), name


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
