"""Jobs on this host, through submitit's local executor.

A job is a session of its own that survives whoever submitted it. Any process can find it
again: its members carry the job's name and folder in their environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from submitit.local.local import LocalExecutor, LocalJob

from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.schedulers.base import (
    JobInfo,
    JobSpec,
    Outcome,
    heal_pickle,
)
from flwr_hpc.schedulers.script import common_fields, job_env, rank_command, render
from flwr_hpc.worker.entry import run_rank

LOG = "controller.err"
# Last words of the controller; others tell of a failure.
OUTCOMES: dict[str, Outcome] = {
    "cancelled": "cancelled",
    "completed": "completed",
    "walltime exceeded": "timeout",
}


def members(name: str, folder: str | Path) -> list[psutil.Process]:
    """Return the living processes of a job, by their environment."""
    found = []
    for process in psutil.process_iter(["environ"]):
        env = process.info["environ"] or {}  # None: another user's
        if env.get("FLWR_HPC_JOB") == name and env.get("FLWR_HPC_JOB_DIR") == str(folder):
            found.append(process)
    return found


def kill(processes: Sequence[psutil.Process], grace_s: float = 0.0) -> None:
    """Send SIGTERM, and SIGKILL to what is left after `grace_s`."""
    alive = list(processes)
    if grace_s > 0:
        _send(alive, signal.SIGTERM)
        _, alive = psutil.wait_procs(alive, timeout=grace_s)
    _send(alive, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5.0)


def _send(processes: Sequence[psutil.Process], signum: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            continue


def script(spec: JobSpec) -> str:
    """Return the shell script that is the job."""
    facility = spec.facility
    walltime = walltime_s(facility.walltime)
    env = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_COMMAND": rank_command(spec),
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_NTASKS": str(facility.ranks_per_node),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(min(10, walltime // 4)),
        "SUBMITIT_LOCAL_TIMEOUT_S": str(walltime),
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_STDERR_TO_STDOUT": "",
        "CUDA_VISIBLE_DEVICES": ",".join(_devices(facility.gpus_per_node)),
        **job_env(spec),
        "FLWR_HPC_JOB_DIR": str(spec.folder),
    }
    own = {"env": env, "python": sys.executable, "folder": spec.folder}
    return render("local.sh.j2", common_fields(spec) | own)


def _devices(count: int) -> list[str]:
    """Return the GPUs of a job: the first of those that this process may use."""
    given = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return (given or [str(k) for k in range(count)])[:count]


class DetachedExecutor(LocalExecutor):  # type: ignore[misc]
    """submitit's local executor whose job lives in its own session."""

    def __init__(self, spec: JobSpec) -> None:
        super().__init__(folder=spec.folder, max_num_timeout=0)
        self.spec = spec
        self.update_parameters(
            timeout_min=walltime_s(spec.facility.walltime) / 60,
            tasks_per_node=spec.facility.ranks_per_node,
        )

    def _submit_command(self, command: str) -> LocalJob[Any]:
        path = self.folder / "submission.sh"
        path.write_text(script(self.spec))
        env = os.environ | {
            # known from the first moment on, before the script exports them again
            "FLWR_HPC_JOB": self.spec.name,
            "FLWR_HPC_JOB_DIR": str(self.folder),
            "FLWR_HPC_T0": str(time.monotonic()),
        }
        with (
            open(self.folder / "controller.out", "ab") as out,
            open(self.folder / LOG, "ab") as err,
        ):
            process = subprocess.Popen(
                ["bash", str(path)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        ranks = list(range(self._num_tasks()))
        return LocalJob(self.folder, str(process.pid), tasks=ranks, process=process)


class LocalScheduler:
    """The host itself as a batch system without a queue."""

    poll_s = 0.5
    grace_s = 4.0  # between SIGTERM and SIGKILL; the controller needs about one second

    def __init__(self) -> None:
        self._children: list[LocalJob[Any]] = []  # or their Popen would complain when collected

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        """Start the job."""
        submitted = DetachedExecutor(spec).submit(run_rank, spec.function, *spec.args)
        assert isinstance(submitted, LocalJob)
        self._children.append(submitted)
        return _job(spec, psutil.Process(int(submitted.job_id)))

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        """Look for a running job of that name."""
        for process in members(spec.name, spec.folder):
            with contextlib.suppress(ProcessLookupError):
                if process.pid == os.getsid(process.pid):
                    heal_pickle(spec.folder, str(process.pid))
                    return _job(spec, process)
        return None

    def cancel_named(self, name: str, but: str = "") -> None:
        """Do nothing: what is started here is started at once."""

    def infos(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobInfo]:
        """Look at the jobs' processes; ranks without a controller are killed."""
        return {job["name"]: self._info(job) for job in jobs}

    def estimate(self, spec: JobSpec) -> float | None:
        """Return 0: there is no queue."""
        return 0.0

    def _info(self, job: dict[str, Any]) -> JobInfo:
        info = JobInfo(
            job["id"],
            job["name"],
            "running",
            submitted_s=job["submitted_s"],
            eligible_s=job["submitted_s"],
            started_s=job["submitted_s"],
            nodes=1,
        )
        if job["host"] != socket.gethostname():
            return JobInfo(job["id"], job["name"], "unknown", reason=f"runs on {job['host']}")
        if _controller(job):
            return info
        kill(members(job["name"], job["folder"]))
        said, ended_s = _last_words(job)
        outcome = OUTCOMES.get(said, "failed")
        return replace(info, state="ended", ended_s=ended_s, outcome=outcome, reason=said)

    def cancel(self, job: dict[str, Any]) -> None:
        """End all processes of the job; returns when they are gone."""
        controller = _controller(job)
        alive = {*members(job["name"], job["folder"]), *([controller] if controller else [])}
        kill(list(alive), self.grace_s)
        kill(members(job["name"], job["folder"]))  # what was started while we looked

    def script(self, spec: JobSpec) -> str:
        """Return the script the job consists of."""
        return script(spec)


def make_scheduler(facility: FacilityConfig) -> LocalScheduler:
    """Return this host; every facility on it has the same."""
    return LocalScheduler()


def _job(spec: JobSpec, controller: psutil.Process) -> dict[str, Any]:
    return {
        "id": str(controller.pid),
        "name": spec.name,
        "scheduler": "local",
        "host": socket.gethostname(),
        "folder": str(spec.folder),
        "submitted_s": controller.create_time(),
    }


def _controller(job: dict[str, Any]) -> psutil.Process | None:
    """Return the process of the job's id if it is alive and still the job's."""
    try:
        process = psutil.Process(int(job["id"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        env = process.environ()
        if env:
            mark = (env.get("FLWR_HPC_JOB"), env.get("FLWR_HPC_JOB_DIR"))
            return process if mark == (job["name"], job["folder"]) else None
        # Empty for a moment, while one program makes way for the next.
        return process if abs(process.create_time() - job["submitted_s"]) < 2.0 else None
    except psutil.Error:
        return None


def _last_words(job: dict[str, Any]) -> tuple[str, float | None]:
    """Return how the controller says the job ended, and when."""
    log = Path(job["folder"]) / LOG
    try:
        words = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
        if words:
            return words[-1], log.stat().st_mtime
    except FileNotFoundError:  # a clean-up removed it, or nothing was started
        return "the job left no word", None
    return "the job's controller was killed", None
