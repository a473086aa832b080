"""A site's allocations and orders, all of it kept in the spool.

Nothing lives in this process that the files do not tell: every call may be the first one of a
new process, and the one before may have been killed anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from flwr_hpc.config import AllocationConfig, FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.jobs import waiting
from flwr_hpc.jobs.entry import work
from flwr_hpc.jobs.lock import locked
from flwr_hpc.jobs.losses import barren, forget, give_up
from flwr_hpc.jobs.prune import prune
from flwr_hpc.jobs.scheduler import JobSpec, Scheduler, SchedulerUnavailableError, checkout
from flwr_hpc.jobs.waiting import Clock
from flwr_hpc.jobs.watch import Verdict, View, Watch, verdict
from flwr_hpc.protocol import Order, Result, SiteState, Status
from flwr_hpc.spool import AllocationDir, Spool, publish

__all__ = ["Site", "job_spec"]


def job_spec(
    spool: Spool,
    run_key: str,
    facility_name: str,
    facility: FacilityConfig,
    allocation: str = "a0000",
    entry: Callable[[str], Any] = work,
) -> JobSpec:
    """Return the job of an allocation."""
    path = spool.allocation(allocation).path.absolute()
    return JobSpec(
        name=f"{run_key}-{facility_name}-{allocation}",
        folder=path / "job",
        facility=facility,
        function=entry,
        args=(str(path),),
        binds=tuple(filter(None, (str(spool.root.absolute()), checkout()))),
    )


class Site:
    """One facility's side of a run: allocations and the orders they work on.

    Parameters
    ----------
    spool : Spool
        The site's folder on the facility's shared file system.
    run_key, facility_name : str
    facility : FacilityConfig
    allocation : AllocationConfig
    scheduler : Scheduler
    spec : dict
        What the worker loads; JSON.
    clock : Clock
    entry : callable
        What every rank runs, called with the allocation's folder.
    """

    def __init__(
        self,
        spool: Spool,
        run_key: str,
        facility_name: str,
        facility: FacilityConfig,
        allocation: AllocationConfig,
        scheduler: Scheduler,
        spec: dict[str, Any],
        clock: Clock,
        entry: Callable[[str], Any] = work,
    ) -> None:
        self.spool = spool
        self.facility_name = facility_name
        self.retries = allocation.retries
        self.scheduler, self.spec, self.clock = scheduler, spec, clock
        self._watch = Watch(scheduler, clock)
        self._asked: dict[str, float] = {}  # submissions without an answer, by allocation
        self._entry, self._run_key, self._facility = entry, run_key, facility

    def acquire(self) -> Status:
        """Return the live allocation's state, asking for a new one if there is none."""
        with locked(self.spool.root):
            while True:
                current = self._current()
                if current is not None:
                    return self._status(*current)
                hopeless = barren(self.spool, self.retries)
                if hopeless is not None:
                    return self._answer("failed", error=hopeless.reason, fatal=hopeless.fatal)
                self._create()

    def hand_in(self, order: Order, weights: Path | None) -> Status:
        """Publish an order and assign it; handed in again, it changes nothing.

        An order that failed before is tried once more.
        """
        with locked(self.spool.root):
            folder = self.spool.order(order.id)
            result = folder.result()
            if result is not None and result.state == "failed":
                forget(self.spool, order.id)
            folder.write_order(order, weights)
            prune(self.spool)
            return self._advance(order.id)

    def collect(self, order_id: str) -> Status:
        """Return the order's result or progress; a dead allocation is replaced."""
        with locked(self.spool.root):
            if not (self.spool.order(order_id).path / "order.json").exists():
                error = f"order '{order_id}' is not known here: hand it in first"
                return self._answer("failed", order_id=order_id, error=error)
            return self._advance(order_id)

    def status(self) -> Status:
        """Return the state of the site; asks for nothing."""
        with locked(self.spool.root):
            current = self._current()
            return self._status(*current) if current else self._answer("idle")

    def wait(
        self, poll: Callable[[], Status], wait_s: float | None, until: Collection[str]
    ) -> Status:
        """Poll until the state is one of `until`, at most `wait_s` seconds (None: no limit)."""
        return waiting.wait(poll, wait_s, until, self.clock)

    def release(self) -> Status:
        """Let allocations end once idle; those still queued are cancelled."""
        with locked(self.spool.root):
            for alloc in self._open():
                alloc.release()
                job = alloc.job() or self._adopt(alloc)
                if self._look(alloc).state == "queued" and job is not None:
                    # If that fails the worker will start, see the release and leave.
                    with contextlib.suppress(SchedulerUnavailableError):
                        self.scheduler.cancel(job)
                        self._watch.end(alloc, Verdict("cancelled"))
            return self._answer("idle")

    def live_jobs(self) -> list[dict[str, Any]]:
        """Return the jobs of this site that the scheduler has not called ended."""
        with locked(self.spool.root):
            jobs = map(self._live_job, self.spool.allocations())
            return [job for job in jobs if job is not None]

    def cancel_all(self) -> None:
        """Cancel every job of this site.

        Raises
        ------
        SchedulerUnavailableError
            Naming the jobs that could not be cancelled.
        """
        left = []
        with locked(self.spool.root):
            for alloc in self.spool.allocations():
                try:
                    job = self._live_job(alloc)
                    if job is not None:
                        self.scheduler.cancel(job)
                except SchedulerUnavailableError as exc:
                    left.append(f"{self._job_spec(alloc.name).name}: {exc}")
                if verdict(alloc) is None:
                    with contextlib.suppress(OSError):  # a full disk must not spare the others
                        self._watch.end(alloc, Verdict("cancelled"))
        if left:
            raise SchedulerUnavailableError("jobs that may be left: " + "; ".join(left))

    def _advance(self, order_id: str) -> Status:
        """Bring an order one step on and say where it is."""
        while True:
            at = self._assigned(order_id)
            result = self.spool.order(order_id).result()  # after the look at its allocation
            if result is None and at is None:
                result = give_up(self.spool, order_id, self.retries)
            if result is not None:
                return self._finished(result, at)
            if at is not None:
                return self._status(*at, order_id=order_id)
            current = self._current()
            (current[0] if current else self._create()).assign(order_id)

    def _assigned(self, order_id: str) -> tuple[AllocationDir, View] | None:
        for alloc in self._open():
            if order_id in alloc.inbox() and (view := self._look(alloc)).state != "ended":
                return alloc, view
        return None

    def _current(self) -> tuple[AllocationDir, View] | None:
        """Return the allocation that takes new orders."""
        for alloc in self._open():
            if not alloc.released and (view := self._look(alloc)).state != "ended":
                return alloc, view
        return None

    def _open(self) -> list[AllocationDir]:
        """Return the allocations without a verdict, newest first."""
        return [a for a in reversed(self.spool.allocations()) if verdict(a) is None]

    def _create(self) -> AllocationDir:
        """Declare a new allocation; `_look` submits it."""
        numbers = [int(a.name[1:]) for a in self.spool.allocations()]
        alloc = self.spool.allocation(f"a{max(numbers, default=-1) + 1:04d}")
        publish(alloc.path / "spec.json", json.dumps(self.spec))
        return alloc

    def _look(self, alloc: AllocationDir) -> View:
        try:
            job = alloc.job() or self._submit(alloc)
        except SchedulerUnavailableError:
            return View("queued")
        except UserError as exc:
            return self._watch.end(alloc, Verdict("failed", str(exc), fatal=True))
        return self._watch.look(alloc, job)

    def _job_spec(self, allocation: str) -> JobSpec:
        return job_spec(
            self.spool,
            self._run_key,
            self.facility_name,
            self._facility,
            allocation,
            self._entry,
        )

    def _submit(self, alloc: AllocationDir) -> dict[str, Any]:
        """Submit the allocation's job, unless a process that died here did."""
        asked = self._asked.get(alloc.name)
        if asked is not None and self.clock.now() - asked < self.scheduler.poll_s:
            raise SchedulerUnavailableError("asked a moment ago")
        self._asked[alloc.name] = self.clock.now()
        job = self._adopt(alloc)
        if job is None:
            (alloc.path / "submitting").touch()  # from here on there may be a job
            job = self.scheduler.submit(self._job_spec(alloc.name))
            publish(alloc.path / "job.json", json.dumps(job))
        return job

    def _adopt(self, alloc: AllocationDir) -> dict[str, Any] | None:
        """Take over a job of the allocation's name that was submitted but not written down."""
        if not (alloc.path / "submitting").exists():
            return None
        job = self.scheduler.find(self._job_spec(alloc.name))
        if job is not None:
            publish(alloc.path / "job.json", json.dumps(job))
        return job

    def _live_job(self, alloc: AllocationDir) -> dict[str, Any] | None:
        job = alloc.job() or self._adopt(alloc)
        return None if job is None or self._watch.is_gone(alloc, job) else job

    def _finished(self, result: Result, at: tuple[AllocationDir, View] | None) -> Status:
        worker = at[1].worker if at else None
        return self._answer(
            result.state,
            order_id=result.order_id,
            allocation=at[0].name if at else "",
            walltime_left_s=worker.walltime_left_s if worker else None,
            result=result,
            steps=result.steps,
            error=result.error,
            fatal=result.fatal,
        )

    def _status(self, alloc: AllocationDir, view: View, order_id: str = "") -> Status:
        assert view.state != "ended"
        state: SiteState = view.state
        known = {"step", "steps", "loss", "tokens_per_s"}
        progress: dict[str, Any] = {}
        if order_id and state == "ready":
            state = "running"
            written = self.spool.order(order_id).progress()
            progress = {k: v for k, v in written.items() if k in known}
        left = view.worker.walltime_left_s if view.worker else None
        return self._answer(
            state, order_id=order_id, allocation=alloc.name, walltime_left_s=left, **progress
        )

    def _answer(self, state: SiteState, **fields: Any) -> Status:
        ledger = {a.name: self._watch.ledger(a) for a in self.spool.allocations()}
        return dataclasses.replace(
            Status(state, facility=self.facility_name, ledger=ledger), **fields
        )
