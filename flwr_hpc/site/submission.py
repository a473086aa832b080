"""From an allocation's folder to its job: submitted once, whoever is killed in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flwr_hpc.clock import Clock
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import (
    JobSpec,
    NotYetError,
    Scheduler,
    SchedulerUnavailableError,
    checkout,
)
from flwr_hpc.site.forecast.base import QueueForecast
from flwr_hpc.spool import AllocationDir, Spool, SubmissionMark
from flwr_hpc.worker.entry import work

# Polling intervals that a submission may take after its last sign; sbatch and qsub are given 120 s.
BUSY_POLLS = 2


def job_spec(
    spool: Spool,
    run_key: str,
    facility_name: str,
    facility: FacilityConfig,
    allocation: str = "a0000",
    entry: Callable[[str], Any] = work,
) -> JobSpec:
    """Return the job of an allocation."""
    alloc = spool.allocation(allocation)
    return JobSpec(
        name=f"{run_key}-{facility_name}-{allocation}",
        folder=alloc.job_folder,
        facility=facility,
        function=entry,
        args=(str(alloc.path.absolute()),),
        binds=tuple(filter(None, (str(spool.root.absolute()), checkout()))),
    )


class Submission:
    """Submits the jobs of a site's allocations.

    Parameters
    ----------
    make_spec : callable
        Returns the job of an allocation of this name.
    scheduler : Scheduler
    clock : Clock
    forecast : QueueForecast
        Learns of each submission.
    """

    def __init__(
        self,
        make_spec: Callable[[str], JobSpec],
        scheduler: Scheduler,
        clock: Clock,
        forecast: QueueForecast,
    ) -> None:
        self.make_spec = make_spec
        self._scheduler, self._clock, self._forecast = scheduler, clock, forecast
        # When and why, by allocation.
        self._unanswered: dict[str, tuple[float, SchedulerUnavailableError]] = {}
        self._next_look_s = float("-inf")  # for late jobs

    def ensure_job(self, alloc: AllocationDir) -> dict[str, Any]:
        """Return the allocation's job; it is submitted unless a process that died here did.

        Raises
        ------
        NotYetError
            It is not submitted, and may be later: call again.
        SchedulerUnavailableError
            It may be submitted or not: call again.
        """
        job = alloc.job()
        if job is not None:
            return job
        if alloc.name in self._unanswered:
            asked, error = self._unanswered[alloc.name]
            if self._clock.now() - asked < self._scheduler.poll_s:
                raise error
        try:
            return self.find_job(alloc) or self._submit(alloc)
        except SchedulerUnavailableError as exc:
            self._unanswered[alloc.name] = self._clock.now(), exc
            raise

    def find_job(self, alloc: AllocationDir) -> dict[str, Any] | None:
        """Return the job, also one that was submitted but not written down; submit none.

        Raises
        ------
        SchedulerUnavailableError
            If that cannot be said now.
        """
        job = alloc.job()
        mark = alloc.submission.read() if job is None else None
        if mark is None:
            return job
        try:
            job = self._scheduler.find(self.make_spec(alloc.name))
        except SchedulerUnavailableError:
            if mark.until_s:  # who does not answer may still take what was sent before
                self._mark(alloc, busy=True)
            raise
        if job is not None:
            with contextlib.suppress(OSError):  # its mark stays, so that it is found again
                alloc.write_job(job)
        elif 0 < mark.until_s - self._clock.wall() <= self._busy_s:
            raise SchedulerUnavailableError(
                "the last request was not answered, or whoever sent it was killed: it may still be "
                "on its way"
            )
        return job

    def cancel_late(self, alloc: AllocationDir) -> None:
        """End what came of requests that were given up, and taken after all.

        Raises
        ------
        SchedulerUnavailableError
            If there may still be such a job.
        """
        mark, job = alloc.submission.read(), alloc.job()
        if mark is None or (job is None and alloc.verdict.read() is None):
            return  # none, or it is looked for before another is submitted
        if mark.sent > (job is not None):
            name = self.make_spec(alloc.name).name
            self._scheduler.cancel_named(name, but=job["id"] if job else "")

    def cancel_late_jobs(self, allocations: Sequence[AllocationDir]) -> None:
        """Do so for all, as often as the scheduler may be asked; what fails is tried again."""
        now = self._clock.now()
        if now < self._next_look_s:
            return
        self._next_look_s = now + self._scheduler.poll_s
        with contextlib.suppress(SchedulerUnavailableError):
            for alloc in allocations:
                self.cancel_late(alloc)

    def trying_s(self, alloc: AllocationDir) -> float:
        """Return for how long we have been trying to submit it."""
        mark = alloc.submission.read()
        return 0.0 if mark is None else max(0.0, self._clock.wall() - mark.since_s)

    def restart_clock(self, alloc: AllocationDir) -> None:
        """Count the tries from now on."""
        if (mark := alloc.submission.read()) is not None:
            alloc.submission.write(replace(mark, since_s=self._clock.wall()))

    def _submit(self, alloc: AllocationDir) -> dict[str, Any]:
        spec = self.make_spec(alloc.name)
        self._forecast.record_submission(spec.name)
        # From here on there may be a job; sbatch goes on if this process is killed meanwhile.
        self._mark(alloc, busy=True, sent=1)
        try:
            job = self._scheduler.submit(spec)
        except UserError:
            self._mark(alloc, busy=False, sent=-1)
            if (mark := alloc.submission.read()) is not None and not mark.sent:
                alloc.submission.remove()  # refused: there is none to look for
            raise
        except NotYetError:
            self._mark(alloc, busy=False, sent=-1)
            raise
        except BaseException as exc:
            self._mark(alloc, busy=isinstance(exc, SchedulerUnavailableError))
            raise
        alloc.write_job(job)
        return job

    def _mark(self, alloc: AllocationDir, *, busy: bool, sent: int = 0) -> None:
        """Note that there may be a job; `busy`: also one that cannot be found yet.

        `sent` more requests may have been taken.
        """
        now = self._clock.wall()
        mark = alloc.submission.read() or SubmissionMark(now)
        until_s = now + self._busy_s if busy else 0.0
        alloc.submission.write(replace(mark, until_s=until_s, sent=mark.sent + sent))

    @property
    def _busy_s(self) -> float:
        return BUSY_POLLS * self._scheduler.poll_s
