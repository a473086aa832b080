"""One loop for every batch system that is asked by commands.

A batch system gives pairs of pure functions: what makes a command, and what reads its answer.
Attempts, patience, time-outs, errors, who is who and what is unknown are written here, once.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import (
    Failure,
    JobInfo,
    JobSpec,
    NotYetError,
    SchedulerUnavailableError,
    heal_pickle,
)
from flwr_hpc.schedulers.rules import Rules

NOT_FOUND = 127


class GarbledAnswerError(SchedulerUnavailableError):
    """The batch system answered with something that cannot be read."""


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    program: str
    code: int
    out: str = ""
    err: str = ""

    @property
    def words(self) -> str:
        """The command's own words about its failure."""
        return self.err.strip() or f"exit code {self.code}"


class CommandScheduler(ABC):
    """A batch system that is asked by commands; a subclass says which, and reads the answers.

    Parameters
    ----------
    facility : FacilityConfig
    sleep, wall : callable
        Between two attempts; Unix time.
    """

    rules: Rules
    # A job that the batch system does not know this long after its submission is lost.
    lost_after_s = 60.0
    # Between attempts at a command that only reads, or may be given twice. Some programs try by
    # themselves for 10 to 20 s when their server is away, and the site is locked meanwhile.
    pauses_s: tuple[float, ...] = (1.0, 4.0)
    patience_s = 8.0
    timeout_s = 60.0
    submit_timeout_s = 120.0
    # Whether `cancel_command` ends the job only if its name is right, too.
    cancels_by_name = False
    # Whether one `history_command` may ask for several jobs.
    history_of_many = True
    # Whether a history that does not answer is none: the list of living jobs decides alone.
    history_optional = False

    def __init__(
        self,
        facility: FacilityConfig,
        sleep: Callable[[float], None] = time.sleep,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.facility, self.poll_s = facility, facility.poll_s
        self._sleep, self._wall = sleep, wall

    # The pairs.

    @abstractmethod
    def script(self, spec: JobSpec) -> str:
        """Return the job script; needs no batch system."""

    @abstractmethod
    def submit_command(self, script: Path, folder: Path) -> list[str]:
        """Return the command that submits a script; `folder` is the job's."""

    @abstractmethod
    def parse_submit(self, out: str) -> str:
        """Return the job's id from what was printed, ``""`` if it is not there."""

    @abstractmethod
    def status_command(self, jobs: Sequence[dict[str, Any]]) -> list[str]:
        """Return the command that lists the living ones of these jobs, and maybe others."""

    @abstractmethod
    def find_command(self, name: str) -> list[str]:
        """Return the command that lists the living jobs of this name, and maybe others."""

    @abstractmethod
    def parse_status(self, answer: Answer) -> list[JobInfo]:
        """Read the list of living jobs; a job without a name of ours has any other name."""

    def history_command(self, jobs: Sequence[dict[str, Any]]) -> list[str] | None:
        """Return the command that says how jobs ended, None if there is none."""
        return None

    def find_history_command(self, name: str) -> list[str] | None:
        """Return the command that lists ended jobs of this name, None if there is none."""
        return None

    def parse_history(self, answer: Answer) -> list[JobInfo] | None:
        """Read ended jobs; None: the batch system forgets how jobs ended."""
        return self.parse_status(answer)

    def merge(self, now: JobInfo | None, then: JobInfo | None) -> JobInfo | None:
        """Return what holds of a job that lives no more, from both lists."""
        return then or now

    @abstractmethod
    def cancel_command(self, job: dict[str, Any]) -> list[str]:
        """Return the command that ends a job."""

    def estimate_command(self) -> list[str] | None:
        """Return the command that judges the script it reads, None if there is none."""
        return None

    def parse_estimate(self, answer: Answer) -> float | None:
        """Return when the job would start, in Unix seconds."""
        return None

    @abstractmethod
    def classify(self, answer: Answer) -> Failure:
        """Return what a command's failure says: ``no answer``, unless its words are known."""

    def identity(self, job_id: str) -> str:
        """Return what of an id does not change between two answers."""
        return job_id

    def age(self, info: JobInfo) -> tuple[float, ...]:
        """Return what grows from one job of a name to the next."""
        return (info.submitted_s or 0.0, number(info.id))

    # The loop.

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        """Submit once: without an answer the job may have been taken."""
        from flwr_hpc.schedulers.executor import ScriptExecutor  # submitit: few messages submit

        executor = ScriptExecutor(spec, self.script(spec), lambda path: self._submit(spec, path))
        submitted = executor.submit(spec.function, *spec.args)
        return self._job(spec, submitted.job_id, self._wall())

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        """Look the name up among the living jobs, then in the history if there is one.

        There may be several, if requests that were not answered were all taken in the end: the
        latest is the job, the others are cancelled.
        """
        mine = self._named(spec.name)
        if not mine:
            infos = self._history(self.find_history_command(spec.name)) or []
            mine = [info for info in infos if info.name == spec.name]
        if not mine:
            return None
        latest = max(mine, key=self.age)
        with contextlib.suppress(SchedulerUnavailableError):  # without a pickle they end
            self._cancel_but(latest.id, mine)
        heal_pickle(spec.folder, latest.id)
        return self._job(spec, latest.id, latest.submitted_s or self._wall())

    def cancel_named(self, name: str, but: str = "") -> None:
        """Look the name up among the living jobs."""
        self._cancel_but(but, self._named(name))

    def infos(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobInfo]:
        """Ask for what lives in one request, and for what does not in the history."""
        if not jobs:
            return {}
        try:
            live = self._live(jobs)
        except SchedulerUnavailableError as exc:
            return {job["name"]: _unknown(job, str(exc)) for job in jobs}
        found = {job["name"]: self._pick(job, live) for job in jobs}
        infos = {name: info for name, info in found.items() if info and info.state != "ended"}
        rest = [job for job in jobs if job["name"] not in infos]
        for some in [rest] if self.history_of_many and rest else [[job] for job in rest]:
            infos |= self._ended(some, found)
        return infos

    def cancel(self, job: dict[str, Any]) -> None:
        """End the job if id and name both match."""
        if not self.cancels_by_name:
            info = self._pick(job, self._live([job]))
            if info is None or info.state == "ended":
                return
        self._ask(self.cancel_command(job))

    def estimate(self, spec: JobSpec) -> float | None:
        """Let the batch system judge the script, where it can without submitting it."""
        command = self.estimate_command()
        if command is None:
            return None
        answer = self._run(command, self.script(spec))
        self._raise_failure(spec, answer)
        start = self.parse_estimate(answer)
        return None if start is None else max(0.0, start - self._wall())

    def _named(self, name: str) -> list[JobInfo]:
        """Return the jobs of this name that the list of living ones has."""
        infos = self.parse_status(self._ask(self.find_command(name)))
        return [info for info in infos if info.name == name]

    def _cancel_but(self, kept: str, infos: Sequence[JobInfo]) -> None:
        failed: list[SchedulerUnavailableError] = []
        for info in infos:
            if info.state != "ended" and self.identity(info.id) != self.identity(kept):
                try:
                    self.cancel({"id": info.id, "name": info.name})
                except SchedulerUnavailableError as exc:
                    failed.append(exc)
        if failed:
            raise failed[0]

    def _submit(self, spec: JobSpec, path: Path) -> str:
        command = self.submit_command(path, spec.folder)
        answer = self._run(command, again=False, timeout_s=self.submit_timeout_s)
        self._raise_failure(spec, answer)
        if not (job_id := self.parse_submit(answer.out)):
            raise SchedulerUnavailableError(
                f"{answer.program}: no job id in what it printed: {answer.out!r}"
            )
        return job_id

    def _live(self, jobs: Sequence[dict[str, Any]]) -> list[JobInfo]:
        try:
            return self.parse_status(self._ask(self.status_command(jobs)))
        except GarbledAnswerError:
            if len(jobs) == 1:
                raise
            return [info for job in jobs for info in self._live([job])]  # another's job is to blame

    def _ended(
        self, jobs: Sequence[dict[str, Any]], found: Mapping[str, JobInfo | None]
    ) -> dict[str, JobInfo]:
        """Return what became of jobs that live no more."""
        # What the list of living jobs still says of an ended one will do.
        again = any(found[job["name"]] is None for job in jobs)
        try:
            past = self._history(self.history_command(jobs), again)
        except SchedulerUnavailableError as exc:
            return {job["name"]: _unknown(job, str(exc)) for job in jobs}
        infos = {}
        for job in jobs:
            info = self.merge(found[job["name"]], self._pick(job, past or []))
            infos[job["name"]] = info or self._lost(job, forgets=past is None)
        return infos

    def _history(self, command: list[str] | None, again: bool = True) -> list[JobInfo] | None:
        if command is None:
            return []
        try:
            return self.parse_history(self._ask(command, again))
        except SchedulerUnavailableError:
            if self.history_optional:
                return []
            raise

    def _pick(self, job: dict[str, Any], infos: Sequence[JobInfo]) -> JobInfo | None:
        """Return the answer about a job: an id alone may have been given away again."""
        me = self.identity(job["id"]), job["name"]
        return next((info for info in infos if (self.identity(info.id), info.name) == me), None)

    def _lost(self, job: dict[str, Any], forgets: bool) -> JobInfo:
        said = f"{self.rules.title} does not know the job"
        if self._wall() - job["submitted_s"] < self.lost_after_s:
            return _unknown(job, said)
        if forgets:
            return JobInfo(job["id"], job["name"], "ended", reason=f"{said} any more")
        return JobInfo(job["id"], job["name"], "ended", outcome="lost", reason=said)

    def _job(self, spec: JobSpec, job_id: str, submitted_s: float) -> dict[str, Any]:
        return {
            "id": job_id,
            "name": spec.name,
            "scheduler": self.facility.scheduler,
            "folder": str(spec.folder),
            "submitted_s": submitted_s,
        }

    def _raise_failure(self, spec: JobSpec, answer: Answer) -> None:
        """Raise if the job was not taken, for ever or for now."""
        if answer.code == 0:
            return
        words, title = answer.words, self.rules.title
        if answer.code == NOT_FOUND:
            raise UserError(
                f"{answer.program} was not found on this host. Run this on the facility's login "
                "node, or set scheduler: local for this facility."
            )
        if self.classify(answer) == "not yet":
            raise NotYetError(f"{title} does not take the job now: {words}")
        raise UserError(
            f"{title} refused the job '{spec.name}': {words}\n"
            f"Check {self.rules.advice} of this facility; dry_run=true shows the script."
        )

    def _ask(self, command: list[str], again: bool = True) -> Answer:
        """Return an answer about jobs, if only that there is none of them."""
        answer = self._run(command, again=again)
        if answer.code and self.classify(answer) != "absent":
            raise SchedulerUnavailableError(f"{answer.program}: {answer.words}")
        return answer

    def _run(
        self, command: list[str], stdin: str = "", again: bool = True, timeout_s: float = 0.0
    ) -> Answer:
        """Run a command, and again while it fails soon and for want of an answer."""
        began = self._wall()
        for pause_s in (*(self.pauses_s if again else ()), None):
            answer = self._once(command, stdin, timeout_s or self.timeout_s)
            if answer.code in (0, NOT_FOUND) or self.classify(answer) != "no answer":
                return answer
            if pause_s is None or self._wall() - began > self.patience_s:
                break
            self._sleep(pause_s)
        raise SchedulerUnavailableError(f"{answer.program}: {answer.words}")

    def _once(self, command: list[str], stdin: str, timeout_s: float) -> Answer:
        try:
            done = subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
                env=self.rules.environment(self.facility, os.environ),
            )
        except subprocess.TimeoutExpired:
            raise SchedulerUnavailableError(f"{command[0]}: no answer in {timeout_s:g} s") from None
        except FileNotFoundError:
            return Answer(command[0], NOT_FOUND, err="not found on this host")
        except OSError as exc:  # say, no more processes for this user
            raise SchedulerUnavailableError(f"{command[0]}: {exc}") from None
        return Answer(command[0], done.returncode, done.stdout, done.stderr)


def number(job_id: str) -> int:
    """Return the number that an id begins with, -1 if there is none."""
    digits = re.match(r"\d+", job_id)
    return int(digits[0]) if digits else -1


def _unknown(job: dict[str, Any], said: str) -> JobInfo:
    return JobInfo(job["id"], job["name"], "unknown", reason=said)
