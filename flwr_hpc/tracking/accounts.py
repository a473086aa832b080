"""What the allocations of one facility cost, in all; memory does not grow with the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr_hpc.tracking.jobs import Job, order_of

MOST = 1000  # jobs kept one by one; older ones are summed up


@dataclass
class Past:
    """The sum of the jobs that are no longer kept one by one."""

    name: str = ""  # The last of them; what is told of it and of older ones is known already
    jobs: int = 0
    starts: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    used_s: float = 0.0  # Node-seconds
    from_ledger_s: float = 0.0
    idle_s: float = 0.0

    def add(self, job: Job) -> None:
        """Take in the oldest job that is left."""
        self.name, self.jobs = job.name, self.jobs + 1
        self.starts += len(job.waits)
        for phase, seconds in job.seconds().items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        used, from_ledger = job.used()
        self.used_s += used
        self.from_ledger_s += from_ledger
        self.idle_s += job.idle()

    def covers(self, name: str) -> bool:
        """Whether an allocation is in the sum."""
        return bool(self.name) and order_of(name) <= order_of(self.name)


@dataclass
class Accounts:
    """The jobs of one facility, by allocation."""

    jobs: dict[str, Job] = field(default_factory=dict)
    past: Past = field(default_factory=Past)
    # Node-seconds of work lost with jobs, and of work that is unless a checkpoint saved it.
    lost_s: float = 0.0
    at_risk_s: float = 0.0
    _at_risk_nodes: int = 1
    _touched: set[str] = field(default_factory=set)  # since their waits were last asked for

    @property
    def allocations(self) -> int:
        """How many allocations have a ledger."""
        return self.past.jobs + sum(bool(job.workers) for job in self.jobs.values())

    @property
    def starts(self) -> int:
        """How often a job was started after a wait that the scheduler tells."""
        return self.past.starts + len(self.queue_waits())

    def of(self, name: str) -> Job | None:
        """Return an allocation's job, new if it was not heard of; None if it is summed up."""
        if name not in self.jobs:
            if self.past.covers(name):
                return None
            self.jobs[name] = Job(name)
            self._sum_up()
        return self.jobs.get(name)

    def take(
        self, ledger: Mapping[str, Mapping[str, float]], said: Mapping[str, Mapping[str, object]]
    ) -> None:
        """Take in an event's ledger and jobs."""
        for name, seconds in ledger.items():
            if job := self.of(name):
                job.account(seconds)
        for name, one in said.items():
            if job := self.of(name):
                job.update(one)
        self._touched |= {name for name in (*ledger, *said) if name in self.jobs}

    def count_lost(self, names: Iterable[str]) -> None:
        """Put at risk what these jobs' ends have cost; to be called once their orders are told."""
        for name in names:
            job = self.jobs.get(name)
            if job and (lost := job.newly_lost()):
                self.at_risk_s += lost
                self._at_risk_nodes = job.nodes

    def order_done(self, kind: str, workers: Iterable[str], seconds: Mapping[str, float]) -> None:
        """One of the last allocations finished an order.

        Parameters
        ----------
        kind : str
        workers : iterable of str
            Who may have: an order's last word often comes with the name of the next one.
        seconds : dict of str to float
            The order's, of which ``resumed`` were taken over from a checkpoint.
        """
        work_s = seconds.get("train", 0.0) + seconds.get("evaluate", 0.0)
        jobs = [self.jobs[name] for name in workers if name in self.jobs]
        if jobs:
            job = min(jobs, key=lambda job: abs(job.unsaved_s - work_s))
            job.saved_s = job.work_s
        if kind == "train":
            saved = min(self.at_risk_s, seconds.get("resumed", 0.0) * self._at_risk_nodes)
            self.lost_s += self.at_risk_s - saved
            self.at_risk_s = 0.0

    def unplaced(self, phases: Iterable[str], until: str) -> dict[str, float]:
        """Return and note seconds by phase that are not on the timeline.

        Of the allocations up to `until` (empty: of all) that somebody waited for.
        """
        found = dict.fromkeys(phases, 0.0)
        names = {n for n in self._touched if not until or order_of(n) <= order_of(until)}
        self._touched -= names
        for job in (self.jobs[name] for name in names if name in self.jobs):
            seconds = job.seconds()
            for phase in found:
                if not self._is_ahead(job):
                    found[phase] += max(0.0, seconds.get(phase, 0.0) - job.placed.get(phase, 0.0))
            job.placed = {phase: seconds.get(phase, 0.0) for phase in found}
        return found

    def _is_ahead(self, job: Job) -> bool:
        """Whether it was submitted while its predecessor lived, so that nobody waited for it."""
        old = self.jobs.get(job.before)
        if old is None or not (old.cycles and job.cycles):
            return False
        submitted, ended = job.cycles[0].submitted_s, old.cycles[-1].ended_s
        return submitted is not None and (ended is None or submitted < ended)

    def seconds(self) -> dict[str, float]:
        """Return seconds by phase over all allocations."""
        total = dict(self.past.seconds)
        for job in self.jobs.values():
            for phase, seconds in job.seconds().items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total

    def node_hours(self) -> dict[str, float] | None:
        """Return node-hours ``used``, of these ``idle``, ``lost`` and ``from_ledger``, or None.

        ``used`` is nodes times the time that the scheduler says a job ran. Where it does not
        tell (a job that still runs, no accounting) the worker's ledger counts, and
        ``from_ledger`` says how much of ``used`` that is. ``idle`` is the ledger's. ``lost`` is
        work (training, evaluation) after the last finished order of a job that was put back in
        the queue or did not end as completed, less what a later one took over by checkpoint.
        """
        if not self.allocations:
            return None
        used = [job.used() for job in self.jobs.values()]
        found = {
            "used": self.past.used_s + sum(u for u, _ in used),
            "idle": self.past.idle_s + sum(job.idle() for job in self.jobs.values()),
            "lost": self.lost_s + self.at_risk_s,
            "from_ledger": self.past.from_ledger_s + sum(by_ledger for _, by_ledger in used),
        }
        return {name: seconds / 3600 for name, seconds in found.items()}

    def queue_waits(self) -> list[float]:
        """Return the seconds in the queue before every start of a job, by the scheduler."""
        return [s for job in self.jobs.values() for s in job.waits]

    def successor(self, present: str) -> str:
        """Return ``queued`` or ``starting`` of a job that comes after `present`, or ``""``."""
        later = [j for n, j in self.jobs.items() if order_of(n) > order_of(present)]
        living = [j for j in later if j.cycles and not j.ended]
        if not present or not living:
            return ""
        return "queued" if all(j.pending for j in living) else "starting"

    def _sum_up(self) -> None:
        if len(self.jobs) > MOST:
            self.past.add(self.jobs.pop(min(self.jobs, key=order_of)))
