"""Runs the points of a sweep in jobs that they share, one job after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.config.facility import walltime_s
from flwr_hpc.files import private_folder
from flwr_hpc.schedulers.base import (
    JobInfo,
    JobSpec,
    Scheduler,
    SchedulerUnavailableError,
    checkout,
    stderr_tail,
)
from flwr_hpc.site.limits import check_spending
from flwr_hpc.sweep.drive import noted_signals
from flwr_hpc.sweep.folder import Point, SweepDir
from flwr_hpc.sweep.job_node import work
from flwr_hpc.sweep.room import Room

LOOK_S = 2.0  # Between looks at the points' files


@dataclass
class SharedJobs:
    """Submits jobs until every point has ended; what a killed command left is waited for."""

    folder: SweepDir
    room: Room
    scheduler: Scheduler
    say: Callable[[str, Point], None]  # With ``started``, ``finished``, ``failed``, ``interrupted``
    tell: Callable[[str], None]  # A line about a job
    clock: Clock = field(default_factory=SystemClock)
    _signals: Sequence[int] = ()
    _said: dict[str, str] = field(default_factory=dict)

    def run(self, points: Sequence[Point]) -> int:
        """Run points to their ends; return the signal that ended the sweep, or 0."""
        names = [point.name for point in points]
        for point in points:
            if point.code:  # it is to be tried again
                self.folder.end(point, None)
        with noted_signals() as self._signals:
            if jobs := self._count():
                self._wait(self._ask(partial(self.scheduler.find, self._spec(jobs - 1, []))), names)
            while (left := self._left(names)) and not self._signals:
                self._wait(self._ask(partial(self._submit, self._next(left))), names)
                if not self._signals and len(self._left(names)) == len(left):
                    self.tell("no point has ended in this job, so no other one is submitted")
                    break
            return self._signals[0] if self._signals else 0

    def _next(self, names: Sequence[str]) -> JobSpec:
        """Return the next job, if there may be one."""
        jobs, job = self._count(), self.room.job
        check_spending(self.room.limits, job, jobs * walltime_s(job.walltime), running=0)
        spec = self._spec(jobs, names)
        private_folder(spec.folder)
        self.tell(f"job {spec.name} for {len(names)} points")
        return spec

    def _submit(self, spec: JobSpec) -> dict[str, Any]:
        """Submit a job, unless a request that was not answered has been taken all the same."""
        return self.scheduler.find(spec) or self.scheduler.submit(spec)

    def _ask(self, what: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """Ask until there is an answer, or a signal to stop."""
        while not self._signals:
            try:
                return what()
            except SchedulerUnavailableError as exc:
                self.tell(f"{exc}; asking again in {self.scheduler.poll_s:g} s")
                self.clock.sleep(self.scheduler.poll_s)
        return None

    def _wait(self, job: dict[str, Any] | None, names: Sequence[str]) -> None:
        """Wait for a job's end, saying what becomes of it and of its points."""
        if job is None:
            return
        cancelled, asked, said = False, float("-inf"), ""
        while True:
            if len(self._signals) > 1:
                self.tell(f"left without waiting for the end of job {job['id']}: resume= does")
                return
            if self._signals and not cancelled:
                cancelled = self._cancel(job)
            self._say_points(job, names)
            if self.clock.now() - asked >= self.scheduler.poll_s:
                asked = self.clock.now()
                info = self.scheduler.infos([job])[job["name"]]
                if said != (line := f"job {job['id']} {_words(info)}"):
                    self.tell(line)
                    said = line
                if info.state == "ended":
                    break
            self.clock.sleep(LOOK_S)
        self._say_points(job, names, ended=True)
        if info.outcome == "failed" and (log := stderr_tail(job)):
            self.tell(log)

    def _cancel(self, job: dict[str, Any]) -> bool:
        with suppress(SchedulerUnavailableError):
            self.scheduler.cancel(job)
            return True
        return False

    def _say_points(self, job: dict[str, Any], names: Sequence[str], ended: bool = False) -> None:
        taken = {path.name for path in Path(job["folder"]).glob("taken-*/*")}
        for point in self.folder.points():
            if point.name not in names or point.name not in taken:
                continue
            if point.code is None:
                what = "interrupted" if ended else "started"
            else:
                what = "failed" if point.code else "finished"
            if self._said.get(point.name) != what:
                self._said[point.name] = what
                self.say(what, point)

    def _left(self, names: Sequence[str]) -> list[str]:
        return [p.name for p in self.folder.points() if p.name in names and p.code is None]

    def _count(self) -> int:
        return len(list(self.folder.jobs.glob("*")))

    def _spec(self, number: int, names: Sequence[str]) -> JobSpec:
        folder, room = self.folder.jobs / f"{number:03d}", self.room
        return JobSpec(
            name=f"sweep-{self.folder.token}-{number:03d}",
            folder=folder,
            facility=room.job,
            function=work,
            args=(
                str(self.folder.path), str(folder), list(names), room.per_node, room.gpus,
                list(room.changes),
            ),
            binds=tuple(filter(None, (str(self.folder.path), checkout()))),
        )  # fmt: skip


def _words(info: JobInfo) -> str:
    state = info.outcome or info.state
    return state if info.reason.lower() in ("", "none", state) else f"{state}: {info.reason}"
