"""What became of an allocation: its worker's word and the scheduler's, brought together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flwr_hpc.clock import Clock
from flwr_hpc.schedulers.base import JobInfo, Scheduler, SchedulerUnavailableError, stderr_tail
from flwr_hpc.site.forecast.base import NoForecast, QueueForecast
from flwr_hpc.site.monitoring.heartbeat import HeartbeatMonitor
from flwr_hpc.site.monitoring.job_states import JobStates
from flwr_hpc.site.monitoring.job_times import record_times
from flwr_hpc.site.monitoring.outcomes import RULES, Why, classify_ended_job, classify_pending_job
from flwr_hpc.spool import AllocationDir, Spool, Verdict, WorkerState

NO_LOG = (
    "It left no log. Whether its nodes see the working folder, and what else they lack, is told "
    "by: python -m flwr_hpc.doctor"
)

Submitted = tuple[AllocationDir, dict[str, Any]]  # an allocation and its job


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
        Learns of waits.
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
        self._job_states = JobStates(spool, scheduler, clock, self._list_jobs)
        self._deadline_s, self._forecast = deadline_s, forecast or NoForecast()
        self._heartbeats = HeartbeatMonitor(clock, stale_s)
        self._recorded: dict[str, JobInfo] = {}
        self._closed: set[str] = set()  # have a verdict
        self._settled: set[str] = set()  # and no job that is not known to have ended

    def is_closed(self, alloc: AllocationDir) -> bool:
        """Tell whether the allocation has a verdict."""
        if alloc.name not in self._closed and alloc.verdict.read() is not None:
            self._closed.add(alloc.name)
        return alloc.name in self._closed

    def look(self, alloc: AllocationDir, job: dict[str, Any]) -> View:
        """Return the state of a submitted allocation, and write down its end."""
        worker = alloc.state()
        if _has_left(worker):
            return self._close_left(alloc, job, worker)
        info = self.job_info(alloc, job)
        if info.state == "ended":
            worker = alloc.state()  # its last word may be younger than the first look
            if _has_left(worker):
                return self._close_left(alloc, job, worker)
            return self._close_ended(alloc, job, info, worker)
        if worker is None or self._heartbeats.is_outdated(alloc, worker, info):
            return self._look_at_waiting(alloc, job, info, worker)
        awake = info.state == "running" and not info.suspended
        if awake and self._heartbeats.has_stopped(alloc):
            words = f"the worker gave no sign of life for {self._heartbeats.stale_s:.0f} s"
            return self._stop(alloc, job, "died", f"{words}\n{stderr_tail(job)}".strip())
        if worker.state == "interrupted":  # ended, or back in the queue: the scheduler will tell
            return View("queued", worker, info, reason="told to end before its time")
        ready = worker.state in ("ready", "running")
        return View("ready" if ready else "starting", worker, info)

    def close(
        self, alloc: AllocationDir, why: Why, reason: str = "", *, fatal: bool = False
    ) -> View:
        """Write down that the allocation is of no more use."""
        worker, rule = alloc.state(), RULES[why]
        alloc.verdict.write(
            Verdict(
                why,
                "fatal" if fatal else rule.consequence,
                ": ".join(filter(None, (rule.message, reason))),
                _was_ready(worker),
                self.spool.complete_checkpoints(),
                self.clock.wall(),
            )
        )
        return View("ended", worker)

    def job_info(self, alloc: AllocationDir, job: dict[str, Any]) -> JobInfo:
        """Return the scheduler's last word on a job, and record what is to be kept of it."""
        info = self._job_states.get(job)
        self._record(alloc, info)
        return info

    def live_jobs(self) -> list[Submitted]:
        """Return the jobs that the scheduler has not called ended; asks it now."""
        allocations = self.spool.allocations()
        return self.living([(a, job) for a in allocations if (job := _live_job(a)) is not None])

    def living(self, jobs: Sequence[Submitted]) -> list[Submitted]:
        """Return those of some jobs that the scheduler does not call ended now."""
        infos = self.scheduler.infos([job for _, job in jobs]) if jobs else {}
        for alloc, job in jobs:
            if job["name"] in infos:
                with contextlib.suppress(OSError):  # a full disk must not spare a job
                    self._record(alloc, infos[job["name"]])
        ended = {name for name, info in infos.items() if info.state == "ended"}
        return [(alloc, job) for alloc, job in jobs if job["name"] not in ended]

    def record_ends(self) -> None:
        """Learn when jobs ended whose allocations are of no more use."""
        for alloc in self.spool.allocations():
            if alloc.name in self._settled or not self.is_closed(alloc):
                continue
            job = _live_job(alloc)
            if job is None or self.job_info(alloc, job).state == "ended":
                self._settled.add(alloc.name)

    def waited_s(self, job: dict[str, Any], info: JobInfo) -> float:
        """Return how long a job has been in the queue this time."""
        return max(0.0, self.clock.wall() - (info.submitted_s or job["submitted_s"]))

    def cancel(self, alloc: AllocationDir, job: dict[str, Any]) -> None:
        """Cancel a job, so that it is known to be our doing even if we are killed here.

        Raises
        ------
        SchedulerUnavailableError
            If the scheduler did not take the request.
        """
        with contextlib.suppress(OSError):  # on a full disk it will seem to be an operator's doing
            alloc.mark_cancelling()
        self.scheduler.cancel(job)

    def _record(self, alloc: AllocationDir, info: JobInfo) -> None:
        if self._recorded.get(alloc.name) == info:
            return
        record_times(alloc, info)
        self._forecast.record_info(info)
        if info.state == "ended":
            alloc.mark_job_ended()
        self._recorded[alloc.name] = info

    def _close_left(
        self, alloc: AllocationDir, job: dict[str, Any], worker: WorkerState | None
    ) -> View:
        """Close an allocation whose worker said that it leaves."""
        assert worker is not None
        if worker.state == "closed":
            return self.close(alloc, "closed")
        self._try_to_cancel(alloc, job)  # other ranks may hang
        why: Why = "disk" if worker.disk else "failed"
        return self.close(alloc, why, worker.error, fatal=worker.fatal)

    def _close_ended(
        self, alloc: AllocationDir, job: dict[str, Any], info: JobInfo, worker: WorkerState | None
    ) -> View:
        """Close an allocation whose job ended without a last word of its worker."""
        words = f"{info.reason} (job {info.id})" if info.reason else f"job {info.id}"
        why = classify_ended_job(info, worker)
        if why == "removed" and alloc.is_cancelling:
            why = "cancelled"
        tail = stderr_tail(job) or (NO_LOG if why == "died" and worker is None else "")
        return self.close(alloc, why, f"{words}\n{tail}".strip())

    def _look_at_waiting(
        self, alloc: AllocationDir, job: dict[str, Any], info: JobInfo, worker: WorkerState | None
    ) -> View:
        """Look at a job whose worker has said nothing yet, or nothing since its last start."""
        if info.state == "running":
            return View("starting", None, info)
        waited = self.waited_s(job, info)
        hopeless = classify_pending_job(info, waited, self._deadline_s)
        if hopeless is None:
            return View("queued", worker, info, info.reason)
        if hopeless[0] == "overdue":
            self._forecast.record_cancellation(job["name"], waited)
        return self._stop(alloc, job, *hopeless)

    def _stop(self, alloc: AllocationDir, job: dict[str, Any], why: Why, reason: str) -> View:
        self._try_to_cancel(alloc, job)
        return self.close(alloc, why, reason)

    def _try_to_cancel(self, alloc: AllocationDir, job: dict[str, Any]) -> None:
        alloc.release()  # should it start in spite of all, its worker leaves
        # If that fails its end is not marked: `AllocationManager.cancel_all` will find it.
        with contextlib.suppress(SchedulerUnavailableError):
            self.cancel(alloc, job)

    def _list_jobs(self) -> Iterator[dict[str, Any]]:
        for alloc in self.spool.allocations():
            if alloc.has_job_ended and self.is_closed(alloc):
                continue
            if (job := alloc.job()) is not None:
                yield job


def _live_job(alloc: AllocationDir) -> dict[str, Any] | None:
    return None if alloc.has_job_ended else alloc.job()


def _has_left(worker: WorkerState | None) -> bool:
    return worker is not None and worker.state in ("closed", "failed")


def _was_ready(worker: WorkerState | None) -> bool:
    if worker is None:
        return False
    worked = any(worker.seconds.get(key, 0.0) > 0 for key in ("train", "evaluate", "idle"))
    return worked or worker.state in ("ready", "running")
