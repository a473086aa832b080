"""Jobs on PBS Professional (OpenPBS), through a submitit executor and a template of ours.

A job is identified by its id and its full name. ``-N`` takes 15 or 236 characters, depending on
the server's age, so the name travels in the job's environment (``-v``), where qstat shows it.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from submitit.core.core import InfoWatcher, Job, PicklingExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import (
    JobInfo,
    JobSpec,
    SchedulerUnavailableError,
    checkout,
    heal_pickle,
    job_env,
    rank_command,
)
from flwr_hpc.schedulers.pbs import parse as pbs
from flwr_hpc.schedulers.script import render

# What selects another server than the host's, given in the facility's `env`.
SERVER = ("PBS_SERVER", "PBS_CONF_FILE")
# Set where this runs inside a job itself; PBS_DPREFIX changes how directives begin.
INSIDE = ("PBS_JOBID", "PBS_ENVIRONMENT", "PBS_NODEFILE", "PBS_DPREFIX")
PER_NODE = {"mpich": ["-ppn", "{}"], "openmpi": ["--map-by", "ppr:{}:node"]}
NOT_FOUND = 127
ANSWERS = (0, pbs.FINISHED, pbs.UNKNOWN_JOB, pbs.NO_HISTORY)


def script(spec: JobSpec) -> str:
    """Return the job script; needs no PBS."""
    f = spec.facility
    ranks = f.nodes * f.ranks_per_node
    per_node = [arg.format(f.ranks_per_node) for arg in PER_NODE[f.mpi]]
    offline = {} if f.internet else {"HF_HUB_OFFLINE": "1"}
    local = {
        "SUBMITIT_LOCAL_JOB_NUM_NODES": str(f.nodes),
        "SUBMITIT_LOCAL_NTASKS": str(ranks),
    }
    fields = {
        "short_name": pbs.short_name(spec.name),
        "name_variable": pbs.NAME,
        "name": spec.name,
        "placement": {k: v for k, v in (("q", f.partition), ("A", f.account)) if v},
        "select": ":".join(filter(None, (str(f.nodes), _chunk(f)))),
        "resources": {"place": "scatter"} | f.qsub,
        "walltime": _hms(walltime_s(f.walltime)),
        "folder": spec.folder,
        "setup": f.setup,
        "env": offline | job_env(spec) | local,
        "checkout": checkout(),
        "launch": shlex.join(["mpiexec", "-n", str(ranks), *per_node, *f.mpiexec_args]),
        "command": rank_command(spec, "flwr_hpc.schedulers.mpi_rank"),
    }
    return render("pbs.sh.j2", fields)


def _chunk(f: FacilityConfig) -> str:
    """Return what a node of the job asks for."""
    if f.chunk is not None:
        return f.chunk
    counts = {
        "ncpus": f.ranks_per_node * f.cpus_per_rank,
        "ngpus": f.gpus_per_node,
        "mpiprocs": f.ranks_per_node,
    }
    return ":".join(f"{key}={count}" for key, count in counts.items() if count)


def _hms(seconds: int) -> str:
    """Return a walltime as PBS takes it: it knows no days."""
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class PbsJob(Job):  # type: ignore[misc]
    """What submitit returns; `PbsScheduler` asks after it, not submitit's own watcher."""

    _cancel_command = "qdel"
    watcher = InfoWatcher()


class PbsExecutor(PicklingExecutor):  # type: ignore[misc]
    """submitit's pickles and folders, with qsub and our job script."""

    job_class = PbsJob

    def __init__(self, spec: JobSpec, prefix: Sequence[str] = ()) -> None:
        super().__init__(spec.folder, max_num_timeout=0)
        self.spec, self.prefix = spec, prefix
        self.update_parameters(timeout_min=walltime_s(spec.facility.walltime) / 60)

    def _num_tasks(self) -> int:
        return self.spec.facility.nodes * self.spec.facility.ranks_per_node

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return script(self.spec)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        command = pbs.qsub(str(submission_file_path), str(self.folder / "pbs.out"))
        return ["timeout", "120", *self.prefix, *command]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        text = string.decode() if isinstance(string, bytes) else string
        if not (job_id := pbs.read_qsub(text)):
            raise FailedSubmissionError(f"no job id in what qsub printed: {text!r}")
        return job_id


class PbsScheduler:
    """One PBS server; ``PBS_SERVER`` in the facility's `env` selects another than the host's.

    Parameters
    ----------
    facility : FacilityConfig
    sleep, wall : callable
        Between two attempts; Unix time.
    """

    # A job that the server does not know this long after its submission is lost.
    lost_after_s = 60.0
    # Between attempts at a command that only reads, or may be given twice.
    pauses_s: tuple[float, ...] = (1.0, 4.0)
    patience_s = 8.0  # the site is locked meanwhile

    def __init__(
        self,
        facility: FacilityConfig,
        sleep: Callable[[float], None] = time.sleep,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.poll_s = facility.poll_s
        self._sleep, self._wall = sleep, wall
        server = [f"{key}={facility.env[key]}" for key in SERVER if key in facility.env]
        unset = [arg for key in INSIDE for arg in ("-u", key)]
        self._prefix = ["env", *unset, "LC_ALL=C", *server]

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        """Submit with qsub, once: without an answer it may have been taken."""
        executor = PbsExecutor(spec, self._prefix)
        try:
            submitted = executor.submit(spec.function, *spec.args)
        except FailedSubmissionError as exc:
            raise SchedulerUnavailableError(f"qsub: {exc}") from None
        except FailedJobError as exc:
            raise _refusal(spec, getattr(exc.__cause__, "returncode", None), str(exc)) from None
        return _job(spec, submitted.job_id, self._wall())

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        """Look through the jobs that live, then through the server's history if it keeps one."""
        for history in (False, True):  # the history of a large centre is long
            jobs = self._qstat(history=history)[0]
            if found := [info for info in jobs if info.name == spec.name]:
                break
        else:
            return None
        latest = max(found, key=lambda info: pbs.number(info.id))
        heal_pickle(spec.folder, latest.id)
        return _job(spec, latest.id, latest.submitted_s or self._wall())

    def infos(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobInfo]:
        """Ask about one job by its id; about several by a list of all that live, in one request.

        Those not in that list are asked about one by one: they have ended, which is told once.
        """
        try:
            live = self._live() if len(jobs) > 1 else []
        except SchedulerUnavailableError as exc:
            return {job["name"]: _no_answer(job, exc) for job in jobs}
        return {job["name"]: _pick(job, live) or self._info(job) for job in jobs}

    def cancel(self, job: dict[str, Any]) -> None:
        """Delete the job if id and name both match."""
        found = _pick(job, self._qstat(job["id"], history=True)[0])
        if found is not None and found.state != "ended":
            done = self._run(pbs.qdel(found.id))
            pbs.read_qdel(done.returncode, done.stderr)

    def estimate(self, spec: JobSpec) -> float | None:
        """Return None: PBS has no trial submission."""
        return None

    def script(self, spec: JobSpec) -> str:
        """Return the job script."""
        return script(spec)

    def _info(self, job: dict[str, Any]) -> JobInfo:
        try:
            known, history = self._qstat(job["id"], history=True)
        except SchedulerUnavailableError as exc:
            return _no_answer(job, exc)
        if (found := _pick(job, known)) is not None:
            return found
        said = "PBS does not know the job"
        if self._wall() - job["submitted_s"] < self.lost_after_s:
            return JobInfo(job["id"], job["name"], "unknown", reason=said)
        if not history:
            return JobInfo(job["id"], job["name"], "ended", reason=f"{said} any more")
        return JobInfo(job["id"], job["name"], "ended", outcome="lost", reason=said)

    def _live(self) -> list[JobInfo]:
        try:
            return self._qstat()[0]
        except pbs.GarbledError:  # by some other user's job
            return []

    def _qstat(self, job_id: str = "", history: bool = False) -> tuple[list[JobInfo], bool]:
        """Return the jobs, and whether finished ones would be among them."""
        done = self._run(pbs.qstat(job_id, history))
        if done.returncode == pbs.NO_HISTORY and history:
            return self._qstat(job_id)
        return pbs.read_qstat(done.returncode, done.stdout, done.stderr), history

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command, again while it fails for want of an answer."""
        began = self._wall()
        for pause_s in (*self.pauses_s, None):
            try:
                done = subprocess.run(
                    self._prefix + command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise SchedulerUnavailableError(f"{command[0]}: no answer in 60 s") from None
            if pause_s is None or done.returncode in ANSWERS:
                break
            if self._wall() - began > self.patience_s:
                break
            self._sleep(pause_s)
        return done


def _refusal(spec: JobSpec, code: int | None, said: str) -> Exception:
    """Return what qsub's failure means: no answer, or an answer that will not change."""
    said = said.strip()
    if code is None or code < 0 or code in pbs.NO_ANSWER:
        return SchedulerUnavailableError(f"qsub: {said or 'no answer'}")
    if code == NOT_FOUND:
        return UserError(
            "qsub was not found on this host. Run this on the facility's login node, "
            "or set scheduler: local for this facility."
        )
    return UserError(
        f"PBS refused the job '{spec.name}': {said}\n"
        f"Check account, partition (the queue), walltime, chunk and qsub of this facility; "
        f"dry_run=true shows the script."
    )


def _pick(job: dict[str, Any], infos: Sequence[JobInfo]) -> JobInfo | None:
    """Return the answer about a job; a server may go by more than one name."""
    mine = (pbs.number(job["id"]), job["name"])
    return next((info for info in infos if (pbs.number(info.id), info.name) == mine), None)


def _no_answer(job: dict[str, Any], exc: Exception) -> JobInfo:
    return JobInfo(job["id"], job["name"], "unknown", reason=str(exc))


def _job(spec: JobSpec, job_id: str, submitted_s: float) -> dict[str, Any]:
    return {
        "id": job_id,
        "name": spec.name,
        "scheduler": "pbs",
        "folder": str(spec.folder),
        "submitted_s": submitted_s,
    }
