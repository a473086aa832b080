"""The allocations of a simulated site: queued, loading, at work, and ended in every way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.simulate.allocation import Allocation, Task, merge, prepare
from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.facility import Facility, Segment
from flwr_hpc.simulate.learning.base import Weights
from flwr_hpc.simulate.queues.models import Queue, Ticket
from flwr_hpc.site.renewal import lead_s, next_successor_in_s

RENEWAL = AllocationConfig()  # the launcher's rule for successors, as it comes
LOOK_S = 1.0  # between two looks whether a successor is due


class Pool:
    """One facility's allocations and the orders they work on.

    Parameters
    ----------
    facility : Facility
    queue : Queue
    clock : VirtualClock
    rng : numpy Generator
        Draws preemptions and failures.
    train : callable
        ``train(task, steps)``: called when so many steps are over.
    changed : callable
        Called when an order or an allocation has come further.
    retries : int
        Failures of one order before it is reported as failed.

    Attributes
    ----------
    node_s : float
        Node seconds of all allocations that have ended.
    orders : int
        Finished so far.
    segments : list of Segment
    """

    def __init__(
        self,
        facility: Facility,
        queue: Queue,
        clock: VirtualClock,
        rng: np.random.Generator,
        train: Callable[[Task, int], None],
        changed: Callable[[], None],
        retries: int,
    ) -> None:
        self.facility, self.queue, self.clock, self.rng = facility, queue, clock, rng
        self.retries = retries
        self.node_s = 0.0
        self._queued_s, self._counted_until = 0.0, clock.now()
        self.orders = 0
        self.segments: list[Segment] = []
        self._train, self._changed = train, changed
        self._allocations: list[Allocation] = []  # not ended, oldest first
        self._made = 0
        self._local: tuple[str, Weights] = "", {}  # what the last order left, in its checkpoint
        self._waits: list[float] = []
        self._attended = False
        self._looks = 0  # planned at which a successor may be due; the last one counts
        for begin, _ in facility.outages:
            clock.at(begin, self._outage)

    # ---- what the site asks for -------------------------------------------------------------

    def assign(self, task: Task) -> None:
        """Give an order to the allocation that takes new ones; without one, ask for one."""
        a = self.current() or self._submit()
        a.inbox.append(task)
        a.released = a.released or self.facility.per_round
        self._work(a)

    def resume(self, task: Task) -> None:
        """Assign an order that no allocation has and that is not done."""
        held = [t for a in self._allocations for t in (a.task, *a.inbox)]
        if not (task.finished or task.failed or any(t is task for t in held)):
            self.assign(task)

    def acquire(self) -> None:
        """Ask for an allocation if there is none."""
        if self.current() is None:
            self._submit()

    def current(self) -> Allocation | None:
        """Return the allocation that takes new orders, see `Allocation.fitness`."""
        able = [a for a in self._allocations if not a.released]
        return max(able, key=Allocation.fitness, default=None)

    def at_work_on(self, task: Task) -> Allocation | None:
        """Return the allocation that works on an order now."""
        return next((a for a in self._allocations if a.task is task), None)

    def release(self) -> None:
        """Let all allocations end once idle; a job that waits leaves the queue.

        Its orders are not begun, and given to another job only when somebody asks for them.
        """
        for a in list(self._allocations):
            a.released = True
            if a.state == "queued":
                a.inbox.clear()
            if a.task is None and (a.state == "queued" or not a.inbox):
                self._close(a)

    def attend(self, here: bool) -> None:
        """Learn whether a message is at the site: the launcher sees to successors only then."""
        self._attended = here
        self._renew()

    def running_node_s(self) -> float:
        """Return the node seconds so far of the allocations that run."""
        now = self.clock.now()
        running = [a for a in self._allocations if a.state in ("loading", "ready")]
        return sum((now - a.started) * self.facility.nodes for a in running)

    def queued_s(self) -> float:
        """Return the seconds so far in which a job waited and none ran, see `Status.queued_s`."""
        now, states = self.clock.now(), [a.state for a in self._allocations]
        if "queued" in states and not {"loading", "ready"} & set(states):
            self._queued_s += now - self._counted_until
        self._counted_until = now
        return self._queued_s

    def steps_so_far(self, a: Allocation) -> int:
        """Return how many steps of its order an allocation has done in this stay."""
        if a.task is None or a.task.order.kind != "train":
            return 0
        ran = int((self.clock.now() - a.task_began) / self.facility.step_s)
        return min(ran, a.task.order.steps - a.task.done)

    # ---- orders -----------------------------------------------------------------------------

    def _work(self, a: Allocation) -> None:
        """Let a ready allocation begin its next order."""
        if a.state != "ready" or a.task is not None or not a.inbox:
            return
        now = self.clock.now()
        self._segment(a, "idle")
        task = a.inbox[0]
        left = task.order.steps - task.done
        if task.order.kind == "train":
            room = self._room(a)
            if room < min(1, left):
                self._close(a)
                return
            steps = min(left, room)
        else:
            steps = 0
        a.inbox.pop(0)
        if not task.start and not merge(task, *self._local):
            task.failed, task.refused = "the weights it goes on from are not here", True
            self._changed()
            self._work(a)
            return
        a.task, a.task_began = task, now
        prepare(task, a.own, a.own_seq)
        stay = a.stay
        done_at = now + steps * self.facility.step_s + self.facility.write_s
        self.clock.at(done_at, lambda: self._finish(a, task, steps, stay))

    def _room(self, a: Allocation) -> int:
        """Return how many steps fit into what is left of the walltime."""
        left_s = a.ends - self.clock.now() - a.kept_s
        return int(left_s / self.facility.step_s + 1e-9)

    def _finish(self, a: Allocation, task: Task, steps: int, stay: int) -> None:
        if a.stay != stay:
            return
        self._train(task, steps)
        if task.order.kind == "train":
            a.own = {k: task.weights[k] - w for k, w in task.start.items()}
            a.own_seq = task.order.seq
            self._local = task.order.id, task.weights
        a.task = None
        self._segment(a, "train")
        if not self.facility.partial_work and task.done < task.order.steps:
            self._stop(a)
            self._end(a, [task])
            return
        if self._room(a) < 1 or (a.released and not a.inbox):
            self._close(a)
        task.finished = not task.failed
        self.orders += 1
        if a.state == "ready":
            self._work(a)
            self._idle(a)
        self._changed()

    # ---- allocations ------------------------------------------------------------------------

    def _submit(self) -> Allocation:
        now = self.clock.now()
        kept_s = self.facility.kept_s(self._made)
        expected_s = self._expected_wait()
        a = Allocation(f"a{self._made:04d}", now, expected_s, kept_s=kept_s, since=now)
        self._made += 1
        self.queued_s()  # up to here; the same before every change of an allocation's state
        self._allocations.append(a)
        self._enqueue(a)
        return a

    def _enqueue(self, a: Allocation) -> None:
        f = self.facility
        a.state, a.submitted, a.since = "queued", self.clock.now(), self.clock.now()
        a.ticket = Ticket(f.nodes, f.walltime_s, start=lambda: self._start(a))
        self.queue.submit(a.ticket)

    def _start(self, a: Allocation) -> None:
        now, f = self.clock.now(), self.facility
        down = [end for begin, end in f.outages if begin <= now < end]
        if down:
            self.clock.at(down[0], lambda: self._start(a) if a.state == "queued" else None)
            return
        self._segment(a, "queue")
        self._waits.append(now - a.submitted)
        self.queued_s()
        a.state, a.started, a.ends, a.since = "loading", now, now + f.walltime_s, now
        a.has_begun = True
        a.stay += 1
        stay = a.stay
        self.clock.at(now + f.startup_s, lambda: self._ready(a, stay))
        for rate, event in (
            (f.preemptions_per_hour, self._preempt),
            (f.failures_per_hour, self._fail),
        ):
            if rate > 0:
                after = float(self.rng.exponential(3600.0 / rate))
                if after < f.walltime_s:
                    self._plan(now + after, event, a, stay)

    def _plan(
        self, when: float, event: Callable[[Allocation], None], a: Allocation, stay: int
    ) -> None:
        self.clock.at(when, lambda: event(a) if a.stay == stay and a.state != "ended" else None)

    def _ready(self, a: Allocation, stay: int) -> None:
        if a.stay != stay:
            return
        self._segment(a, "load")
        a.state = "ready"
        self._plan(a.ends - a.kept_s, self._expire, a, stay)
        if not a.released:
            self._hand_over()
        self._renew()
        if a.state != "ready":
            return
        self._work(a)
        self._idle(a)
        self._changed()

    def _hand_over(self) -> None:
        """Let the others go once the allocation that takes new orders is ready.

        What waits for its first start stays: it is a successor. Orders that nobody works on go
        where new ones would.
        """
        to = self.current()
        for a in [a for a in self._allocations if a is not to and not a.released]:
            if to is None or to.state != "ready":
                return
            if a.state != "ready":
                to.inbox += a.inbox
                a.inbox.clear()
            if a.state == "ready" or (a.has_begun and a.name < to.name):
                a.released = True
                if a.task is None and not a.inbox:
                    self._close(a)

    def _renew(self) -> None:
        """Submit the successors that are due, by the launcher's rule; plan the next look."""
        f, now, a = self.facility, self.clock.now(), self.current()
        if not self._attended or a is None or a.state == "loading":
            return
        config = replace(RENEWAL, max_successors=f.max_successors)
        left_s = a.ends - now if a.state == "ready" else None
        queued = [b for b in self._allocations if b.state == "queued" and not b.released]
        starts_in_s = [max(0.0, b.submitted + b.expected_s - now) for b in queued]
        lead = lead_s(config, f.walltime_s, self._expected_wait(), f.startup_s)
        due_in_s = next_successor_in_s(config, f.walltime_s, lead, left_s, starts_in_s)
        if due_in_s is None:
            return
        if due_in_s < LOOK_S:
            self._submit()
        self._looks += 1
        look, then = self._looks, now + max(due_in_s, LOOK_S)
        self.clock.at(then, lambda: self._renew() if look == self._looks else None)

    def _expected_wait(self) -> float:
        """Return what is expected of the next allocation."""
        forecast = self.facility.forecasts_s[self._made : self._made + 1]
        if forecast:
            return forecast[0]
        return float(np.median(self._waits[-9:])) if self._waits else 0.0

    def _idle(self, a: Allocation) -> None:
        """Plan the end of an allocation that nobody gives work to."""
        if a.state == "ready" and a.task is None:
            since = a.since
            self._plan(
                self.clock.now() + self.facility.idle_timeout_s,
                lambda a: self._close(a) if a.task is None and a.since == since else None,
                a,
                a.stay,
            )

    def _expire(self, a: Allocation) -> None:
        if a.task is None:  # else the running order was planned to be done by now
            self._close(a)

    def _preempt(self, a: Allocation) -> None:
        """Put the job back in the queue; the order goes on from its checkpoint."""
        self.queued_s()
        steps = self.steps_so_far(a)
        task = self._stop(a)
        if task is not None:
            self._train(task, steps)
            a.inbox.insert(0, task)
        self._enqueue(a)

    def _fail(self, a: Allocation) -> None:
        """End the job at once; what the running order has trained is lost."""
        task = self._stop(a)
        if task is not None:
            task.tries += 1
            if task.tries > self.retries:
                task.failed = f"gave up after {task.tries} allocations"
                task = None
        self._end(a, [task] if task is not None else [])

    def _close(self, a: Allocation) -> None:
        self._stop(a)
        self._end(a, [])

    def _end(self, a: Allocation, undone: list[Task]) -> None:
        self.queued_s()
        a.state = "ended"
        self._allocations.remove(a)
        if a.ticket is not None:
            a.ticket.cancelled = True
            self.queue.ended(a.ticket)
        for task in [*undone, *a.inbox]:
            self.assign(task)
        self._changed()

    def _stop(self, a: Allocation) -> Task | None:
        """Void what was planned for an allocation, and account for its time."""
        if a.state in ("loading", "ready"):
            self._segment(a, "load" if a.state == "loading" else "train" if a.task else "idle")
            self.node_s += (self.clock.now() - a.started) * self.facility.nodes
            if a.ticket is not None:
                self.queue.ended(a.ticket)
        else:
            self._segment(a, "queue")
        a.stay += 1
        task, a.task = a.task, None
        return task

    def _outage(self) -> None:
        for a in list(self._allocations):
            if a.state in ("loading", "ready"):
                self._fail(a)

    def _segment(self, a: Allocation, what: Any) -> None:
        now = self.clock.now()
        if now > a.since:
            self.segments.append(Segment(a.name, what, a.since, now))
        a.since = now
