"""A site's allocations and orders, all of it kept in the spool.

Nothing lives in this process alone: every call may be the first one of a new process, and the
one before may have been killed anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from flwr_hpc.clock import Clock
from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.config.schema import AllocationConfig, LimitsConfig
from flwr_hpc.errors import UserError
from flwr_hpc.protocol import Order, Result, Status
from flwr_hpc.schedulers.base import (
    JobInfo,
    NotYetError,
    Scheduler,
    SchedulerUnavailableError,
)
from flwr_hpc.site import long_poll
from flwr_hpc.site.forecast.base import NoForecast, QueueForecast
from flwr_hpc.site.limits import LimitReached, check_spending
from flwr_hpc.site.monitoring.job_times import total_s
from flwr_hpc.site.monitoring.monitor import Monitor, Submitted, View
from flwr_hpc.site.renewal import Renewal
from flwr_hpc.site.retries import (
    check_disk,
    fail_if_cancelled,
    fail_if_retries_are_spent,
    repeated_startup_failure,
    reset_order,
)
from flwr_hpc.site.status import StatusBuilder
from flwr_hpc.site.submission import Submission, job_spec
from flwr_hpc.spool import AllocationDir, Spool, retention
from flwr_hpc.worker.entry import work

HANDOVER_S = 120.0  # for a released allocation to write down what the next one goes on from
RANKED = ("queued", "starting", "ready")

Living = tuple[AllocationDir, View]


class AllocationManager:
    """One facility's side of a run: allocations and the orders they work on.

    New orders go to an allocation that is ready, else to one that starts, else to one that waits.
    Others may wait in the queue to succeed it, see `flwr_hpc.site.renewal`.

    Parameters
    ----------
    spool : Spool
        The site's folder on the facility's shared file system.
    run_key, facility_name : str
    facility : FacilityConfig
    allocation : AllocationConfig
    scheduler : Scheduler
    settings : mapping
        What the worker loads; JSON.
    clock : Clock
    entry : callable
        What every rank runs, called with the allocation's folder.
    forecast : QueueForecast or None
        None: nothing is known of the queue.
    limits : LimitsConfig or None
        None: it may spend what it takes.
    """

    def __init__(
        self,
        spool: Spool,
        run_key: str,
        facility_name: str,
        facility: FacilityConfig,
        allocation: AllocationConfig,
        scheduler: Scheduler,
        settings: Mapping[str, Any],
        clock: Clock,
        entry: Callable[[str], Any] = work,
        forecast: QueueForecast | None = None,
        limits: LimitsConfig | None = None,
    ) -> None:
        self.spool, self.clock = spool, clock
        self.facility_name, self.scheduler = facility_name, scheduler
        self._config, self._settings = allocation, settings
        self._forecast = forecast or NoForecast()
        self._facility, self._limits = facility, limits or LimitsConfig()
        self._submission = Submission(
            lambda name: job_spec(spool, run_key, facility_name, facility, name, entry),
            scheduler, clock, self._forecast,
        )  # fmt: skip
        deadline_s = allocation.queue_deadline_s
        self._monitor = Monitor(spool, scheduler, clock, deadline_s, self._forecast)
        self._status = StatusBuilder(spool, facility_name, self._monitor, self._forecast, clock)
        walltime = walltime_s(facility.walltime)
        self._renewal = Renewal(allocation, walltime, self._forecast, clock)

    # ---- messages ---------------------------------------------------------------------------

    def acquire(self) -> Status:
        """Return the live allocation's state, asking for a new one if there is none."""
        with self.spool.lock():
            while True:
                current = self._current()
                if current is not None:
                    self._tend_queue()
                    return self._status.of_allocation(*current)
                failure = repeated_startup_failure(self.spool, self._config.retries)
                if failure is not None:
                    error, fatal = failure.reason, failure.consequence == "fatal"
                    return self._status.of_state("failed", error=error, fatal=fatal)
                self._create()

    def submit(
        self, order: Order, weights: Path | None, extra_arrays: Mapping[str, Path] | None = None
    ) -> Status:
        """Publish an order and assign it; submitted again, it changes nothing.

        An order that failed before is tried once more.
        """
        with self.spool.lock():
            # A message that was long under way:
            if order.seq < retention.settled(self.spool, order.run_key):
                error = f"order '{order.id}' is settled: it is not worked on again"
                return self._status.of_state("failed", order_id=order.id, error=error)
            folder = self.spool.order(order.id)
            result = folder.result()
            if result is not None and result.state == "failed":
                reset_order(self.spool, order.id)
            folder.write_order(order, weights, extra_arrays)
            retention.prune(self.spool)
            return self._advance(order.id)

    def collect(self, order_id: str) -> Status:
        """Return the order's result or progress; a dead allocation is replaced."""
        with self.spool.lock():
            if not self.spool.order(order_id).exists:
                error = f"order '{order_id}' is not known here: submit it first"
                return self._status.of_state("failed", order_id=order_id, error=error)
            return self._advance(order_id)

    def status(self) -> Status:
        """Return the state of the site; asks for nothing but a live allocation's successors."""
        with self.spool.lock():
            self._tend_queue()
            current = self._current()
            if current is None:
                return self._status.of_state("idle")
            return self._status.of_allocation(*current)

    def status_with_forecast(self) -> Status:
        """Return the state of the site with a forecast of the queue."""
        forecast = self._forecast.forecast()  # may ask the scheduler, so without the lock
        return dataclasses.replace(self.status(), forecast=forecast)

    def wait(
        self, poll: Callable[[], Status], wait_s: float | None, until: Collection[str]
    ) -> Status:
        """Poll until the state is one of `until`, at most `wait_s` seconds (None: no limit)."""
        return long_poll.wait(poll, wait_s, until, self.clock, self.scheduler.poll_s)

    def withdraw(self, order_id: str) -> None:
        """Take back an order that nobody waits for; a job that has begun may finish it."""
        with self.spool.lock():
            for alloc in self._open():
                if order_id in alloc.inbox() and self._update(alloc).state == "queued":
                    alloc.unassign(order_id)

    def release(self) -> Status:
        """Let allocations end once idle; those still queued are cancelled."""
        with self.spool.lock():
            for alloc in self._open():
                self._release(alloc)
            return self._status.of_state("idle")

    def live_jobs(self) -> list[dict[str, Any]]:
        """Return the jobs of this site that the scheduler has not called ended."""
        with self.spool.lock():
            for alloc in self.spool.allocations():
                self._submission.cancel_late(alloc)
                self._submission.find_job(alloc)
            return [job for _, job in self._monitor.live_jobs()]

    def costs(self) -> Status:
        """Return what the jobs have cost, by the scheduler's present word."""
        with self.spool.lock():
            self._monitor.live_jobs()
            return self._status.of_state("idle")

    def cancel_all(self) -> None:
        """Cancel every job of this site.

        Raises
        ------
        SchedulerUnavailableError
            Naming the jobs that could not be cancelled.
        """
        left: dict[str, Exception] = {}
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # of a disk that cannot be written
                stack.enter_context(self.spool.lock())
            jobs: list[Submitted] = []
            for alloc in self.spool.allocations():
                try:
                    self._submission.cancel_late(alloc)
                    if not alloc.has_job_ended and (job := self._submission.find_job(alloc)):
                        jobs.append((alloc, job))
                except (SchedulerUnavailableError, OSError) as exc:
                    left[alloc.name] = exc
            for alloc, job in self._monitor.living(jobs):
                try:
                    self._monitor.cancel(alloc, job)
                except (SchedulerUnavailableError, OSError) as exc:
                    left[alloc.name] = exc
            for alloc in self._open():
                with contextlib.suppress(OSError):  # a full disk must not spare the others
                    self._monitor.close(alloc, "cancelled")
        if left:
            named = ((self._submission.make_spec(name).name, exc) for name, exc in left.items())
            raise SchedulerUnavailableError(
                "jobs that may be left: " + "; ".join(f"{job}: {exc}" for job, exc in named)
            )

    # ---- orders -----------------------------------------------------------------------------

    def _advance(self, order_id: str) -> Status:
        """Bring an order one step on and say where it is."""
        while True:
            assigned = self._assigned(order_id)
            result = self.spool.order(order_id).result()  # after the look at its allocation
            if result is None and assigned is None:
                result = self._fail_without_job(order_id)
            if result is not None:
                current = self._current()
                ready = current if current and current[1].state == "ready" else None
                return self._status.of_result(result, ready)
            if assigned is not None:
                self._tend_queue()
                return self._status.of_allocation(*assigned, order_id=order_id)
            current = self._current()
            if current is not None and self._must_wait_for_handover(*current):
                return self._status.of_allocation(*current, order_id=order_id)
            self._assign(current[0] if current else self._create(), order_id)

    def _fail_without_job(self, order_id: str) -> Result | None:
        """Return a failed result if no other job may be submitted for the order."""
        if not self._config.replace_cancelled and (r := fail_if_cancelled(self.spool, order_id)):
            return r
        return fail_if_retries_are_spent(self.spool, order_id, self._config.retries)

    def _assigned(self, order_id: str) -> Living | None:
        """Return the allocation that has the order, if that will do."""
        for alloc in self._open():
            if order_id not in alloc.inbox() or (view := self._update(alloc)).state == "ended":
                continue
            if view.state == "queued" and self._is_another_ready(alloc):
                alloc.unassign(order_id)
                continue
            if self._config.policy == "per_round":
                alloc.release()  # whoever assigned it may have been killed before that
            return alloc, view
        return None

    def _is_another_ready(self, alloc: AllocationDir) -> bool:
        """Tell whether this one, put back in the queue or overtaken there, holds up an order."""
        current = self._current()
        return current is not None and current[0] != alloc and current[1].state == "ready"

    def _assign(self, alloc: AllocationDir, order_id: str) -> None:
        alloc.assign(order_id)
        if self._config.policy == "per_round":
            alloc.release()  # after the assignment: the worker still does this one

    def _must_wait_for_handover(self, to: AllocationDir, view: View) -> bool:
        """Tell whether another allocation may still write the state that this one goes on from.

        The worker itself looks for it, once, as it begins with the order.
        """
        if view.state != "ready":
            return False
        for alloc in self._open():
            may_write = alloc != to and alloc.released and self._update(alloc).state == "ready"
            if may_write and self.clock.wall() - alloc.released_s < HANDOVER_S:
                return True
        return False

    # ---- allocations ------------------------------------------------------------------------

    def _current(self) -> Living | None:
        """Return the allocation that takes new orders; once it is ready, others are let go.

        The ready one that lasts longest, else one that starts, else the one that waits longest.
        What waits for its first start stays: it is a successor.
        """
        views = [(alloc, self._update(alloc)) for alloc in self._open()]
        living = [(a, view) for a, view in views if view.state != "ended" and not a.released]
        best = max(living, key=lambda candidate: _fitness(*candidate), default=None)
        if best is not None and best[1].state == "ready":
            for alloc, view in living:
                older = alloc.number < best[0].number and view.has_begun
                if alloc != best[0] and (older or view.state == "ready"):
                    self._release(alloc)
        return best

    def _tend_queue(self) -> None:
        """Cancel late jobs; submit successors of the allocation that takes new orders in time."""
        self._submission.cancel_late_jobs(self.spool.allocations())
        current = self._current()
        if current is None:
            return
        alloc, view = current
        newer = [a for a in self.spool.allocations() if a.number > alloc.number]
        # A successor that has failed is not replaced before it is needed. One that was let go
        # started out of turn, and this one took over from it.
        if any(self._monitor.is_closed(a) and not a.released for a in newer):
            return
        if (runs := view.state != "queued") and view.walltime_left_s is None:
            return
        queued = [a for a in self._open() if not a.released and not (runs and a == alloc)]
        if any(a.job() is None for a in queued):
            return  # not even that one is taken yet
        ledgers = [self._status.account(a).ledger for a in self.spool.allocations()]
        waits = [self._queue_wait(a) for a in queued]
        if self._renewal.is_due(view.walltime_left_s, waits, ledgers):
            with contextlib.suppress(LimitReached):  # whoever needs it is told
                self._update(self._create())

    def _queue_wait(self, alloc: AllocationDir) -> tuple[JobInfo | None, float]:
        """Return what the scheduler says of a job in the queue, and how long it has waited."""
        info, job = self._update(alloc).info, alloc.job()
        return info, self._monitor.waited_s(job, info) if info and job else 0.0

    def _open(self) -> list[AllocationDir]:
        """Return the allocations without a verdict, newest first."""
        return [a for a in reversed(self.spool.allocations()) if not self._monitor.is_closed(a)]

    def _create(self) -> AllocationDir:
        """Declare a new allocation; `_update` submits it."""
        check_disk(self.spool, self.clock.wall())
        self._check_spending()
        alloc = self.spool.new_allocation()
        alloc.write_settings(self._settings)
        return alloc

    def _check_spending(self) -> None:
        allocations = self.spool.allocations()
        closed = [a for a in allocations if a.has_job_ended or self._monitor.is_closed(a)]
        ran_s = sum(total_s(self._status.account(a).runs) for a in closed)
        check_spending(self._limits, self._facility, ran_s, len(allocations) - len(closed))

    def _update(self, alloc: AllocationDir) -> View:
        """Return an allocation's state; it is submitted if it is not."""
        try:
            unneeded = alloc.released and not alloc.inbox()
            if unneeded and self._submission.find_job(alloc) is None:
                return self._monitor.close(alloc, "cancelled")
            job = self._submission.ensure_job(alloc)
        except SchedulerUnavailableError as exc:
            if isinstance(exc, NotYetError) and self._has_other_job(alloc):
                self._submission.restart_clock(alloc)  # a limit that our own job may be up to
            if self._submission.trying_s(alloc) > self._config.queue_deadline_s:
                return self._monitor.close(alloc, "overdue", f"it could not be submitted: {exc}")
            return View("queued", reason=f"not submitted yet: {exc}")
        except UserError as exc:
            return self._monitor.close(alloc, "rejected", str(exc))
        return self._monitor.look(alloc, job)

    def _has_other_job(self, alloc: AllocationDir) -> bool:
        """Tell whether another of the site's jobs may live, by what is written down."""
        others = (a for a in self.spool.allocations() if a != alloc)
        return any(a.job() is not None and not a.has_job_ended for a in others)

    def _release(self, alloc: AllocationDir) -> None:
        """Let an allocation end once idle; one that waits in the queue is cancelled."""
        alloc.release()
        # If that fails the worker will start, see the release and leave.
        with contextlib.suppress(SchedulerUnavailableError):
            job = self._submission.find_job(alloc)
            if job is None:
                self._monitor.close(alloc, "cancelled")
            elif (view := self._monitor.look(alloc, job)).state == "queued":
                self._monitor.cancel(alloc, job)
                if view.info is not None:
                    waited_s = self._monitor.waited_s(job, view.info)
                    self._forecast.record_cancellation(job["name"], waited_s)
                self._monitor.close(alloc, "cancelled")


def _fitness(alloc: AllocationDir, view: View) -> tuple[int, float, int]:
    """Return what to choose among allocations by: the greatest takes new orders."""
    rank = RANKED.index(view.state)
    if view.state == "queued":
        return rank, 0.0, -alloc.number
    return rank, view.walltime_left_s or 0.0, alloc.number
