"""What the scheduler last said of a site's jobs.

Kept in a file, ``SITE/queue.json``, since every message to a site is a process of its own: the
scheduler is asked about all jobs at once, and no more often than it likes, by all of them
together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr_hpc.clock import Clock
from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import from_json
from flwr_hpc.schedulers.base import JobInfo, Scheduler


class Queue:
    """One facility's only watcher; to be called with the site locked.

    Parameters
    ----------
    root : Path
        The site's folder.
    scheduler : Scheduler
    clock : Clock
    jobs : callable
        Returns the jobs of which news are wanted; what was said of others is forgotten.
    """

    def __init__(
        self,
        root: Path,
        scheduler: Scheduler,
        clock: Clock,
        jobs: Callable[[], Iterable[dict[str, Any]]],
    ) -> None:
        self._file = root / "queue.json"
        self._scheduler, self._clock, self._jobs = scheduler, clock, jobs

    def info(self, job: dict[str, Any]) -> JobInfo:
        """Return what is known of a job, ``unknown`` before the first answer."""
        said = read_json(self._file) or {"asked": float("-inf"), "infos": {}}
        age = self._clock.wall() - said["asked"]
        if not 0 <= age < self._scheduler.poll_s:  # below 0: the clock was set back
            said = self._ask(said["infos"])
        raw = said["infos"].get(job["name"])
        if raw is None or raw["id"] != job["id"]:
            return JobInfo(job["id"], job["name"], "unknown")
        return from_json(JobInfo, json.dumps(raw))

    def _ask(self, known: dict[str, Any]) -> dict[str, Any]:
        jobs = list(self._jobs())
        infos = {job["name"]: known[job["name"]] for job in jobs if job["name"] in known}
        for name, info in self._scheduler.infos(jobs).items():
            if info.state != "unknown" or name not in infos:  # else: no news
                infos[name] = asdict(info)
        said = {"asked": self._clock.wall(), "infos": infos}
        publish(self._file, json.dumps(said))
        return said
