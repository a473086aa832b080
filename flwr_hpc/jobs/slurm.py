"""Jobs on a Slurm cluster, through submitit's Slurm executor and a template of ours.

Every look-up is a pair: a command, and a pure function that reads its output. A job is
identified by its id and its name: slurmctld can lose a job and give its id away again.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from flwr_hpc.config import FacilityConfig, walltime_s
from flwr_hpc.errors import UserError
from flwr_hpc.facility import PLACEMENT, queue_of
from flwr_hpc.jobs.render import render
from flwr_hpc.jobs.scheduler import (
    JobInfo,
    JobSpec,
    JobState,
    SchedulerUnavailableError,
    checkout,
    heal_pickle,
    job_env,
    rank_command,
)

__all__ = ["SlurmScheduler", "TemplateExecutor", "parse_jobs", "script"]

FIELDS = "%i|%j|%T|%V|%S|%r"
SACCT_FIELDS = "JobID,JobName,State,Submit,Start,Reason"

# Slurm's states; those not listed are "unknown".
NATIVE: dict[JobState, str] = {
    "pending": "CONFIGURING PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT",
    "running": "COMPLETING RESIZING RUNNING SIGNALING STAGE_OUT STOPPED SUSPENDED",
    "ended": "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED "
    "REVOKED TIMEOUT",
}
STATES: dict[str, JobState] = {word: s for s, words in NATIVE.items() for word in words.split()}

# What sbatch says when slurmctld is busy or away, in lower case; all else is a refusal.
TRANSIENT = (
    "unable to contact slurm controller",
    "socket timed out",
    "temporarily unable",
    "connection refused",
    "connection timed out",
    "transport endpoint",
    "zero bytes were transmitted",
    "try again",
)


def script(spec: JobSpec) -> str:
    """Return the batch script of a job; needs no Slurm."""
    f = spec.facility
    logs = str(spec.folder).replace("%", "%%")
    queue = queue_of(f)
    options = ({"requeue": ""} if queue and queue.preemptable else {}) | f.sbatch
    offline = {} if f.internet else {"HF_HUB_OFFLINE": "1"}
    fields = {
        "name": spec.name,
        "placement": {k: v for k in PLACEMENT if (v := getattr(f, k))} | _gpus(f),
        "nodes": f.nodes,
        "ranks_per_node": f.ranks_per_node,
        "cpus_per_rank": f.cpus_per_rank,
        "walltime": f.walltime,
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
    """

    poll_s = 30.0
    # A job that slurmctld does not know this long after its submission is lost.
    lost_after_s = 60.0

    def __init__(self, facility: FacilityConfig) -> None:
        inside = [k for k in os.environ if k.startswith("SLURM_") and k != "SLURM_CONF"]
        conf = facility.env.get("SLURM_CONF")
        self._prefix = ["env", *(arg for key in inside for arg in ("-u", key))]
        self._prefix += ["SLURM_TIME_FORMAT=%s"] + ([f"SLURM_CONF={conf}"] if conf else [])

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        """Submit with sbatch."""
        executor = TemplateExecutor(spec, self._prefix)
        try:
            submitted = executor.submit(spec.function, *spec.args)
        except (FailedJobError, FailedSubmissionError) as exc:
            said = str(exc).strip()
            if not said or any(word in said.lower() for word in TRANSIENT):
                raise SchedulerUnavailableError(f"sbatch: {said or 'no answer'}") from None
            if "'sbatch'" in said.replace("\u2018", "'").replace("\u2019", "'"):  # env: not found
                raise UserError(
                    "sbatch was not found on this host. Run this on the facility's login node, "
                    "or set scheduler: local for this facility."
                ) from None
            raise UserError(
                f"Slurm refused the job '{spec.name}': {said}\n"
                f"Check account, partition, qos, walltime and sizes of this facility; the script "
                f"is in {spec.folder}."
            ) from None
        return _job(spec, submitted.job_id, time.time())

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        """Look the name up in the queue, then in the accounting if there is one."""
        found = parse_jobs(self._ask(self._squeue("--name", spec.name)), spec.name)
        if not found:
            found = parse_jobs(self._accounting("--name", spec.name, "-S", "now-30days"), spec.name)
        if not found:
            return None
        latest = max(found, key=lambda info: int(info.id))
        heal_pickle(spec.folder, latest.id)
        return _job(spec, latest.id, latest.submitted_s or time.time())

    def info(self, job: dict[str, Any]) -> JobInfo:
        """Ask slurmctld, which knows what lives, then the accounting, which knows what ended."""
        try:
            queue = self._ask(self._squeue("-j", job["id"]), missing="Invalid job id")
        except SchedulerUnavailableError as exc:
            return JobInfo(job["id"], job["name"], "unknown", reason=str(exc))
        found = [info for info in parse_jobs(queue, job["name"]) if info.id == job["id"]]
        if not found:  # what only the accounting takes for alive, slurmctld has lost
            past = parse_jobs(self._accounting("-j", job["id"]), job["name"])
            found = [info for info in past if info.id == job["id"] and info.state == "ended"]
        if found:
            return found[0]
        if time.time() - job["submitted_s"] < self.lost_after_s:
            return JobInfo(job["id"], job["name"], "unknown")
        return JobInfo(job["id"], job["name"], "ended", reason="Slurm does not know the job")

    def cancel(self, job: dict[str, Any]) -> None:
        """Cancel the job if id and name both match."""
        command = ["scancel", f"--jobname={job['name']}", job["id"]]
        self._ask(command, missing="Invalid job id")

    def script(self, spec: JobSpec) -> str:
        """Return the batch script."""
        return script(spec)

    def _squeue(self, *which: str) -> list[str]:
        return ["squeue", "--noheader", "--states=all", f"--format={FIELDS}", *which]

    def _accounting(self, *which: str) -> str:
        command = ["sacct", "-X", "--noheader", "--parsable2", "-o", SACCT_FIELDS, *which]
        try:
            return self._ask(command)
        except SchedulerUnavailableError:  # many clusters keep none
            return ""

    def _ask(self, command: list[str], missing: str = "") -> str:
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
        if done.returncode == 0:
            return done.stdout
        if missing and missing in done.stderr:
            return ""
        raise SchedulerUnavailableError(f"{command[0]}: {done.stderr.strip()}")


def parse_jobs(text: str, name: str) -> list[JobInfo]:
    """Read what squeue or sacct printed; jobs of another name are left out."""
    jobs = []
    for line in text.splitlines():
        fields = line.strip().split("|", 5)
        if len(fields) == 6 and fields[1] == name:
            jobs.append(_read(*fields))
    return jobs


def _read(id_: str, name: str, state: str, submit: str, start: str, reason: str) -> JobInfo:
    word = (state.split() or [""])[0].rstrip("+")  # "CANCELLED by 1000"
    known = STATES.get(word, "unknown")
    submitted = _epoch(submit)
    started = _epoch(start) if known in ("running", "ended") else None  # else: a forecast
    waited = None if submitted is None or started is None else max(0.0, started - submitted)
    said = state if reason in ("", "None") else f"{state} ({reason})"
    return JobInfo(id_, name, known, submitted, started, waited, said)


def _epoch(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def _job(spec: JobSpec, job_id: str, submitted_s: float) -> dict[str, Any]:
    return {
        "id": job_id,
        "name": spec.name,
        "scheduler": "slurm",
        "folder": str(spec.folder),
        "submitted_s": submitted_s,
    }
