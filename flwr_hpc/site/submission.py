"""From an allocation's folder to its job: submitted once, whoever is killed in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr_hpc.clock import Clock
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.files import publish, read_json
from flwr_hpc.schedulers.base import JobSpec, Scheduler, SchedulerUnavailableError, checkout
from flwr_hpc.site.renewal import QueueForecast
from flwr_hpc.spool import AllocationDir, Spool
from flwr_hpc.worker.entry import work

BUSY_POLLS = 2  # polling intervals that a submission may take; sbatch and qsub are given 120 s


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


class Submission:
    """Submits the jobs of a site's allocations.

    Parameters
    ----------
    spec : callable
        Returns the job of an allocation of this name.
    scheduler : Scheduler
    clock : Clock
    forecast : QueueForecast
        Told of each submission.
    """

    def __init__(
        self,
        spec: Callable[[str], JobSpec],
        scheduler: Scheduler,
        clock: Clock,
        forecast: QueueForecast,
    ) -> None:
        self.spec = spec
        self._scheduler, self._clock, self._forecast = scheduler, clock, forecast
        self._asked: dict[str, tuple[float, str]] = {}  # without an answer, by allocation

    def job(self, alloc: AllocationDir) -> dict[str, Any]:
        """Return the allocation's job; it is submitted unless a process that died here did.

        Raises
        ------
        SchedulerUnavailableError
            It may be submitted or not: call again.
        """
        job = alloc.job()
        if job is not None:
            return job
        asked, words = self._asked.get(alloc.name, (float("-inf"), ""))
        if self._clock.now() - asked < self._scheduler.poll_s:
            raise SchedulerUnavailableError(words)
        try:
            return self.known(alloc) or self._submit(alloc)
        except SchedulerUnavailableError as exc:
            self._asked[alloc.name] = self._clock.now(), str(exc)
            raise

    def known(self, alloc: AllocationDir) -> dict[str, Any] | None:
        """Return the job, also one that was submitted but not written down; submit none.

        Raises
        ------
        SchedulerUnavailableError
            If that cannot be said now.
        """
        job = alloc.job()
        mark = read_json(_mark(alloc)) if job is None else None
        if mark is None:
            return job
        job = self._scheduler.find(self.spec(alloc.name))
        if job is not None:
            publish(alloc.path / "job.json", json.dumps(job))
        elif 0 < mark.get("until_s", 0.0) - self._clock.wall() <= self._busy_s:
            raise SchedulerUnavailableError(
                "whoever submitted it was killed, and the request may still be on its way"
            )
        return job

    def trying_s(self, alloc: AllocationDir) -> float:
        """Return for how long we have been trying to submit it."""
        began = read_json(_mark(alloc))
        return 0.0 if began is None else max(0.0, self._clock.wall() - began["since_s"])

    def _submit(self, alloc: AllocationDir) -> dict[str, Any]:
        spec = self.spec(alloc.name)
        self._forecast.submitting(spec.name)
        now = self._clock.wall()
        mark = {"since_s": (read_json(_mark(alloc)) or {}).get("since_s", now)}
        # From here on there may be a job; sbatch goes on if this process is killed meanwhile.
        publish(_mark(alloc), json.dumps(mark | {"until_s": now + self._busy_s}))
        try:
            job = self._scheduler.submit(spec)
        except UserError:  # refused: there is none to look for
            _mark(alloc).unlink()
            raise
        except BaseException:
            publish(_mark(alloc), json.dumps(mark))
            raise
        publish(alloc.path / "job.json", json.dumps(job))
        return job

    @property
    def _busy_s(self) -> float:
        return BUSY_POLLS * self._scheduler.poll_s


def _mark(alloc: AllocationDir) -> Path:
    return alloc.path / "submitting"
