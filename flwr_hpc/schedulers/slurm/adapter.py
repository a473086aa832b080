"""Jobs on a Slurm cluster, through submitit's Slurm executor and a template of ours.

Every look-up is a pair: a command, and a pure function that reads its output. A job is
identified by its id and its name: slurmctld can lose a job and give its id away again.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from flwr_hpc.config.facility import PLACEMENT, FacilityConfig, queue_of, walltime_s
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
from flwr_hpc.schedulers.script import render
from flwr_hpc.schedulers.slurm.parse import (
    SACCT,
    SQUEUE,
    merge,
    read_sacct,
    read_squeue,
    read_start,
)

# What sbatch says when slurmctld is busy or away, in lower case; all else is a refusal.
TRANSIENT = (
    "unable to contact slurm controller",
    "socket timed out",
    "temporarily unable",
    "temporarily unavailable",
    "connection refused",
    "connection timed out",
    "transport endpoint",
    "zero bytes were transmitted",
    "try again",
    "rate limit",
    "protocol authentication error",  # munged is being restarted
)


def script(spec: JobSpec) -> str:
    """Return the batch script of a job; needs no Slurm."""
    f = spec.facility
    logs = str(spec.folder).replace("%", "%%")
    queue = queue_of(f)
    requeue = queue is not None and queue.preemptable and "no-requeue" not in f.sbatch
    options = ({"requeue": ""} if requeue else {}) | f.sbatch
    offline = {} if f.internet else {"HF_HUB_OFFLINE": "1"}
    fields = {
        "name": spec.name,
        "placement": {k: v for k in PLACEMENT if (v := getattr(f, k))} | _gpus(f),
        "nodes": f.nodes,
        "ranks_per_node": f.ranks_per_node,
        "cpus_per_rank": f.cpus_per_rank,
        "walltime": f.walltime,
        "signal_s": max(1, min(90, walltime_s(f.walltime) // 10)),
        "options": [f"{k}={v}" if v else k for k, v in options.items()],
        "setup": f.setup,
        "env": offline | job_env(spec),
        "checkout": checkout(),
        "srun_args": f.srun_args,
        "command": rank_command(spec),
        "output": f"{logs}/%j_%t_log.out",
        "error": f"{logs}/%j_%t_log.err",
        "output_0": f"{logs}/%j_0_log.out",
        "error_0": f"{logs}/%j_0_log.err",
    }
    return render("slurm.sh.j2", fields)


def _gpus(f: FacilityConfig) -> dict[str, str]:
    """Return the request for the allocation's GPUs, in the centre's manner."""
    counts = {
        "gres": f.gpus_per_node,
        "gpus": f.nodes * f.gpus_per_node,
        "gpus-per-node": f.gpus_per_node,
        "gpus-per-task": f.gpus_per_node // f.ranks_per_node,
    }
    kind = [f.gpu_type] if f.gpu_type else []
    parts = [*(["gpu"] if f.gpu_request == "gres" else []), *kind, str(counts[f.gpu_request])]
    return {f.gpu_request: ":".join(parts)} if f.gpus_per_node else {}


class TemplateExecutor(SlurmExecutor):  # type: ignore[misc]
    """submitit's Slurm executor with our job script."""

    def __init__(self, spec: JobSpec, prefix: list[str]) -> None:
        super().__init__(spec.folder, max_num_timeout=0)
        self.spec, self.prefix = spec, prefix
        self.update_parameters(
            time=max(1, walltime_s(spec.facility.walltime) // 60),
            nodes=spec.facility.nodes,
            ntasks_per_node=spec.facility.ranks_per_node,
        )

    @classmethod
    def affinity(cls) -> int:
        """Be available: a host that submits need not have srun."""
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return script(self.spec)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["timeout", "120", *self.prefix, "sbatch", str(submission_file_path)]


class SlurmScheduler:
    """One Slurm cluster; ``SLURM_CONF`` in the facility's `env` selects another than the host's.

    Parameters
    ----------
    facility : FacilityConfig
    sleep, wall : callable
        Between two attempts; Unix time.
    """

    # A job that slurmctld does not know this long after its submission is lost.
    lost_after_s = 60.0
    # Between attempts at a command that only reads, or may be given twice; those of Slurm try
    # by themselves for 10 to 20 s when slurmctld is away, and the site is locked meanwhile.
    pauses_s: tuple[float, ...] = (1.0, 4.0)
    patience_s = 8.0

    def __init__(
        self,
        facility: FacilityConfig,
        sleep: Callable[[float], None] = time.sleep,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.poll_s = facility.poll_s
        self._sleep, self._wall = sleep, wall
        conf = facility.env.get("SLURM_CONF")
        self._prefix = ["env", *(arg for key in _foreign(facility) for arg in ("-u", key))]
        self._prefix += ["SLURM_TIME_FORMAT=%s"] + ([f"SLURM_CONF={conf}"] if conf else [])

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        """Submit with sbatch, once: without an answer it may have been taken."""
        executor = TemplateExecutor(spec, self._prefix)
        try:
            submitted = executor.submit(spec.function, *spec.args)
        except (FailedJobError, FailedSubmissionError) as exc:
            said = str(exc).strip()
            if not said or _is_transient(said):
                raise SchedulerUnavailableError(f"sbatch: {said or 'no answer'}") from None
            raise _refusal(spec, said) from None
        return _job(spec, submitted.job_id, self._wall())

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        """Look the name up in the queue, then in the accounting if there is one."""
        found = _named(spec, read_squeue(self._squeue("--name", spec.name)))
        if not found:
            past = self._accounting("--name", spec.name, "-S", "now-30days")
            found = _named(spec, read_sacct(past))
        if not found:
            return None
        latest = max(found, key=lambda info: (info.submitted_s or 0.0, int(info.id)))
        heal_pickle(spec.folder, latest.id)
        return _job(spec, latest.id, latest.submitted_s or self._wall())

    def infos(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobInfo]:
        """Ask slurmctld, which knows what lives, then the accounting, which knows what ended."""
        if not jobs:
            return {}
        try:
            live = read_squeue(self._squeue("--jobs", ",".join(job["id"] for job in jobs)))
        except SchedulerUnavailableError as exc:
            return {
                j["name"]: JobInfo(j["id"], j["name"], "unknown", reason=str(exc)) for j in jobs
            }
        listed = {(info.id, info.name): info.state for info in live}
        states = [listed.get((job["id"], job["name"])) for job in jobs]
        rest = [j["id"] for j, state in zip(jobs, states, strict=True) if state in ("ended", None)]
        # What slurmctld says of an ended job will do; of one it has forgotten it says nothing.
        told = self._accounting("-j", ",".join(rest), again=None in states) if rest else ""
        past = read_sacct(told)
        return {job["name"]: merge(job, live, past) or self._unknown(job) for job in jobs}

    def cancel(self, job: dict[str, Any]) -> None:
        """Cancel the job if id and name both match."""
        self._ask(["scancel", f"--jobname={job['name']}", job["id"]], missing="Invalid job id")

    def estimate(self, spec: JobSpec) -> float | None:
        """Ask ``sbatch --test-only``, which answers on its standard error."""
        done = self._run(["sbatch", "--test-only"], script(spec))
        if done.returncode:
            raise _refusal(spec, done.stderr.strip())
        start = read_start(done.stderr)
        return None if start is None else max(0.0, start - self._wall())

    def script(self, spec: JobSpec) -> str:
        """Return the batch script."""
        return script(spec)

    def _unknown(self, job: dict[str, Any]) -> JobInfo:
        said = "Slurm does not know the job"
        if self._wall() - job["submitted_s"] < self.lost_after_s:
            return JobInfo(job["id"], job["name"], "unknown", reason=said)
        return JobInfo(job["id"], job["name"], "ended", outcome="lost", reason=said)

    def _squeue(self, *which: str) -> str:
        # With a user slurmctld sends that user's jobs alone, not the whole queue.
        mine = ["squeue", f"--user={os.getuid()}", *SQUEUE, *which]
        return self._ask(mine, missing="Invalid job id")

    def _accounting(self, *which: str, again: bool = True) -> str:
        try:
            return self._ask(["sacct", *SACCT, *which], again=again)
        except SchedulerUnavailableError:  # many clusters keep none
            return ""

    def _ask(self, command: list[str], missing: str = "", again: bool = True) -> str:
        done = self._run(command, again=again)
        if done.returncode == 0:
            return done.stdout
        if missing and missing in done.stderr:
            return ""
        raise SchedulerUnavailableError(f"{command[0]}: {done.stderr.strip()}")

    def _run(
        self, command: list[str], stdin: str = "", again: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, and again while it fails soon and for want of an answer."""
        began = self._wall()
        for pause_s in (*(self.pauses_s if again else ()), None):
            done = self._once(command, stdin)
            if done.returncode == 0 or not _is_transient(done.stderr):
                return done
            if pause_s is None or self._wall() - began > self.patience_s:
                break
            self._sleep(pause_s)
        raise SchedulerUnavailableError(f"{command[0]}: {done.stderr.strip()}")

    def _once(self, command: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                self._prefix + command,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SchedulerUnavailableError(f"{command[0]}: no answer in 60 s") from None


def _foreign(facility: FacilityConfig) -> list[str]:
    """Return the variables that would change what a command does.

    Those of a job this runs in, and those that sbatch puts above the script: a user's or site's
    default stays where the facility says nothing of the kind.
    """
    defaults = {f"SBATCH_{key.upper()}" for key in PLACEMENT if not getattr(facility, key)}
    inside = "SLURM_" if "SLURM_JOB_ID" in os.environ else "SBATCH_"
    kept = defaults | {"SLURM_CONF", "SLURM_CLUSTERS"}
    return [k for k in os.environ if k.startswith((inside, "SBATCH_")) and k not in kept]


def _is_transient(said: str) -> bool:
    return any(word in said.lower() for word in TRANSIENT)


def _refusal(spec: JobSpec, said: str) -> UserError:
    if "'sbatch'" in said.replace("\u2018", "'").replace("\u2019", "'"):  # env: not found
        return UserError(
            "sbatch was not found on this host. Run this on the facility's login node, "
            "or set scheduler: local for this facility."
        )
    return UserError(
        f"Slurm refused the job '{spec.name}': {said}\n"
        f"Check account, partition, qos, walltime and sizes of this facility; dry_run=true shows "
        f"the script."
    )


def _named(spec: JobSpec, infos: Iterable[JobInfo]) -> list[JobInfo]:
    return [info for info in infos if info.name == spec.name]


def _job(spec: JobSpec, job_id: str, submitted_s: float) -> dict[str, Any]:
    return {
        "id": job_id,
        "name": spec.name,
        "scheduler": "slurm",
        "folder": str(spec.folder),
        "submitted_s": submitted_s,
    }
