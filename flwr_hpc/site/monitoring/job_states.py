"""What the scheduler last said of a site's jobs.

Kept in a file, since every message to a site is a process of its own: the scheduler is asked
about all jobs at once, and no more often than it likes, by all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from flwr_hpc.clock import Clock
from flwr_hpc.protocol import from_dict
from flwr_hpc.schedulers.base import JobInfo, Scheduler
from flwr_hpc.spool import SchedulerAnswer, Spool


class JobStates:
    """One facility's only watcher; to be called with the site locked.

    Parameters
    ----------
    spool : Spool
    scheduler : Scheduler
    clock : Clock
    list_jobs : callable
        Returns the jobs of which news are wanted; what was said of others is forgotten.
    """

    def __init__(
        self,
        spool: Spool,
        scheduler: Scheduler,
        clock: Clock,
        list_jobs: Callable[[], Iterable[dict[str, Any]]],
    ) -> None:
        self._file = spool.job_states
        self._scheduler, self._clock, self._list_jobs = scheduler, clock, list_jobs

    def get(self, job: dict[str, Any]) -> JobInfo:
        """Return the scheduler's last word on a job, ``unknown`` before the first answer."""
        last = self._file.read() or SchedulerAnswer()
        age = self._clock.wall() - last.asked_s
        if not 0 <= age < self._scheduler.poll_s:  # below 0: the clock was set back
            last = self._ask(last)
        raw = last.jobs.get(job["name"])
        if raw is None or raw["id"] != job["id"]:
            return JobInfo(job["id"], job["name"], "unknown")
        return from_dict(JobInfo, raw)

    def _ask(self, last: SchedulerAnswer) -> SchedulerAnswer:
        jobs = list(self._list_jobs())
        infos = {job["name"]: last.jobs[job["name"]] for job in jobs if job["name"] in last.jobs}
        for name, info in self._scheduler.infos(jobs).items():
            if info.state != "unknown" or name not in infos:  # else: no news
                infos[name] = asdict(info)
        answer = SchedulerAnswer(self._clock.wall(), infos)
        self._file.write(answer)
        return answer
