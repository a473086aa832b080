"""What became of an allocation: its worker's word and the scheduler's, brought together.

Kept beside the worker's files in the allocation's folder::

    ended.json   launcher: why the allocation is of no more use (`Verdict`), once
    times.json   launcher: the scheduler's own times of the job
    cancelling   launcher: from here on the job may be cancelled, by us
    gone         launcher: the scheduler said that the job has ended
    seen.json    launcher: the worker's last known beat, and when it was seen
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from flwr_hpc.clock import Clock
from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import from_json
from flwr_hpc.schedulers.base import JobInfo, Scheduler, SchedulerUnavailableError, stderr_tail
from flwr_hpc.site.heartbeat import Heartbeat
from flwr_hpc.site.job_times import keep_times
from flwr_hpc.site.outcomes import ENDS, Verdict, Why, of_job, of_pending
from flwr_hpc.site.queue import Queue
from flwr_hpc.site.renewal import NoForecast, QueueForecast
from flwr_hpc.spool import AllocationDir, Spool, WorkerState

NO_LOG = (
    "It left no log. Whether its nodes see the working folder, and what else they lack, is told "
    "by: python -m flwr_hpc.doctor"
)


@dataclass(frozen=True)
class View:
    """An allocation now."""

    state: Literal["queued", "starting", "ready", "ended"]
    worker: WorkerState | None = None  # Its last word; of a former start if the state is ``queued``
    info: JobInfo | None = None  # The scheduler's last word
    reason: str = ""  # Why a queued one waits

    @property
    def has_begun(self) -> bool:
        """Whether the job has ever started."""
        return self.state != "queued" or self.worker is not None

    @property
    def walltime_left_s(self) -> float | None:
        """Return the worker's word on it; None while queued."""
        started = self.state in ("starting", "ready") and self.worker is not None
        return self.worker.walltime_left_s if started and self.worker else None


def verdict(alloc: AllocationDir) -> Verdict | None:
    """Return how the allocation ended, or None while it has not."""
    raw = read_json(alloc.path / "ended.json")
    return from_json(Verdict, json.dumps(raw)) if raw is not None else None


def is_gone(alloc: AllocationDir) -> bool:
    """Tell whether the scheduler has said that the job has ended."""
    return (alloc.path / "gone").exists()


class Monitor:
    """Looks at a site's allocations.

    Parameters
    ----------
    spool : Spool
    scheduler : Scheduler
    clock : Clock
    deadline_s : float
        A job that has waited longer is cancelled.
    forecast : QueueForecast
        Told of waits.
    stale_s : float
        A worker whose beat stands still for so long, while its job runs, hangs.
    """

    def __init__(
        self,
        spool: Spool,
        scheduler: Scheduler,
        clock: Clock,
        deadline_s: float = float("inf"),
        forecast: QueueForecast | None = None,
        stale_s: float = 120.0,
    ) -> None:
        self.spool, self.scheduler, self.clock = spool, scheduler, clock
        self.queue = Queue(spool.root, scheduler, clock, self._jobs)
        self._deadline_s, self._forecast = deadline_s, forecast or NoForecast()
        self._beats = Heartbeat(clock, stale_s)
        self._told: dict[str, JobInfo] = {}
        self._closed: set[str] = set()  # have a verdict
        self._settled: set[str] = set()  # and no job that is not known to have ended

    def is_closed(self, alloc: AllocationDir) -> bool:
        """Tell whether the allocation has a verdict."""
        if alloc.name not in self._closed and verdict(alloc) is not None:
            self._closed.add(alloc.name)
        return alloc.name in self._closed

    def look(self, alloc: AllocationDir, job: dict[str, Any]) -> View:
        """Return the state of a submitted allocation, and write down its end."""
        worker = alloc.state()
        if worker is not None and worker.state in ("closed", "failed"):
            return self._left(alloc, job, worker)
        info = self.info(alloc, job)
        if info.state == "ended":
            worker = alloc.state()  # its last word may be younger than the first look
            if worker is not None and worker.state in ("closed", "failed"):
                return self._left(alloc, job, worker)
            return self._gone(alloc, job, info, worker)
        if worker is None or self._beats.former(alloc.path, worker, info):
            return self._waits(alloc, job, info, worker)
        awake = info.state == "running" and not info.suspended
        if awake and self._beats.stopped(alloc.path, worker):
            words = f"the worker gave no sign of life for {self._beats.stale_s:.0f} s"
            return self._stop(alloc, job, "died", f"{words}\n{stderr_tail(job)}".strip())
        if worker.state == "interrupted":  # ended, or back in the queue: the scheduler will tell
            return View("queued", worker, info, reason="told to end before its time")
        ready = worker.state in ("ready", "running")
        return View("ready" if ready else "starting", worker, info)

    def end(self, alloc: AllocationDir, why: Why, reason: str = "", *, fatal: bool = False) -> View:
        """Write down that the allocation is of no more use."""
        worker = alloc.state()
        how = Verdict(
            why,
            ": ".join(filter(None, (ENDS[why].says, reason))),
            fatal or ENDS[why].then == "fatal",
            _was_ready(worker),
            self._checkpoints(),
        )
        publish(alloc.path / "ended.json", json.dumps(dataclasses.asdict(how)))
        return View("ended", worker)

    def info(self, alloc: AllocationDir, job: dict[str, Any]) -> JobInfo:
        """Return the scheduler's last word on a job, and keep what is to be kept of it."""
        info = self.queue.info(job)
        self._keep(alloc, info)
        return info

    def living(self) -> list[tuple[AllocationDir, dict[str, Any]]]:
        """Return the jobs that the scheduler has not called ended; asks it now."""
        jobs = [(a, job) for a in self.spool.allocations() if (job := self._job(a)) is not None]
        infos = self.scheduler.infos([job for _, job in jobs]) if jobs else {}
        for alloc, job in jobs:
            if job["name"] in infos:
                with contextlib.suppress(OSError):  # a full disk must not spare a job
                    self._keep(alloc, infos[job["name"]])
        return [(alloc, job) for alloc, job in jobs if not is_gone(alloc)]

    def settle(self) -> None:
        """Learn when jobs ended whose allocations are of no more use."""
        for alloc in self.spool.allocations():
            if alloc.name in self._settled or not self.is_closed(alloc):
                continue
            job = self._job(alloc)
            if job is None or self.info(alloc, job).state == "ended":
                self._settled.add(alloc.name)

    def _keep(self, alloc: AllocationDir, info: JobInfo) -> None:
        if self._told.get(alloc.name) == info:
            return
        keep_times(alloc, info)
        self._forecast.observe(info)
        if info.state == "ended":
            (alloc.path / "gone").touch()
        self._told[alloc.name] = info

    def _left(self, alloc: AllocationDir, job: dict[str, Any], worker: WorkerState) -> View:
        if worker.state == "closed":
            return self.end(alloc, "closed")
        self._cancel(alloc, job)  # other ranks may hang
        return self.end(alloc, "failed", worker.error, fatal=worker.fatal)

    def _gone(
        self, alloc: AllocationDir, job: dict[str, Any], info: JobInfo, worker: WorkerState | None
    ) -> View:
        words = f"{info.reason} (job {info.id})" if info.reason else f"job {info.id}"
        why = of_job(info, worker)
        if why == "removed" and (alloc.path / "cancelling").exists():
            why = "cancelled"
        tail = stderr_tail(job) or (NO_LOG if why == "died" and worker is None else "")
        return self.end(alloc, why, f"{words}\n{tail}".strip())

    def _waits(
        self, alloc: AllocationDir, job: dict[str, Any], info: JobInfo, worker: WorkerState | None
    ) -> View:
        """Look at a job whose worker has said nothing yet, or nothing since its last start."""
        if info.state == "running":
            return View("starting", None, info)
        waited = self.waited_s(job, info)
        hopeless = of_pending(info, waited, self._deadline_s)
        if hopeless is None:
            return View("queued", worker, info, info.reason)
        if hopeless[0] == "overdue":
            self._forecast.gave_up(job["name"], waited)
        return self._stop(alloc, job, *hopeless)

    def waited_s(self, job: dict[str, Any], info: JobInfo) -> float:
        """Return how long a job has been in the queue this time."""
        return max(0.0, self.clock.wall() - (info.submitted_s or job["submitted_s"]))

    def _stop(self, alloc: AllocationDir, job: dict[str, Any], why: Why, reason: str) -> View:
        self._cancel(alloc, job)
        return self.end(alloc, why, reason)

    def cancel(self, alloc: AllocationDir, job: dict[str, Any]) -> None:
        """Cancel a job, so that it is known to be our doing even if we are killed here.

        Raises
        ------
        SchedulerUnavailableError
            If the scheduler did not take the request.
        """
        with contextlib.suppress(OSError):  # on a full disk it will seem to be an operator's doing
            (alloc.path / "cancelling").touch()
        self.scheduler.cancel(job)

    def _cancel(self, alloc: AllocationDir, job: dict[str, Any]) -> None:
        alloc.release()  # should it start in spite of all, its worker leaves
        # If that fails it is not marked as gone: `Site.cancel_all` will find it.
        with contextlib.suppress(SchedulerUnavailableError):
            self.cancel(alloc, job)

    def _jobs(self) -> Iterator[dict[str, Any]]:
        for alloc in self.spool.allocations():
            if is_gone(alloc) and self.is_closed(alloc):
                continue
            if (job := alloc.job()) is not None:
                yield job

    def _job(self, alloc: AllocationDir) -> dict[str, Any] | None:
        return None if is_gone(alloc) else alloc.job()

    def _checkpoints(self) -> list[str]:
        found = self.spool.checkpoints.glob("[!.]*@*")
        return sorted(path.name for path in found if (path / "meta.json").exists())


def _was_ready(worker: WorkerState | None) -> bool:
    if worker is None:
        return False
    worked = any(worker.seconds.get(key, 0.0) > 0 for key in ("train", "evaluate", "idle"))
    return worked or worker.state in ("ready", "running")
