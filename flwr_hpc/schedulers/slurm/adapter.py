"""Jobs on a Slurm cluster: its commands, and the job script.

A job is identified by its id and its name: slurmctld can lose a job and give its id away again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr_hpc.config.facility import PLACEMENT, FacilityConfig, queue_of, walltime_s
from flwr_hpc.schedulers.base import Failure, JobInfo, JobSpec
from flwr_hpc.schedulers.command import Answer, CommandScheduler
from flwr_hpc.schedulers.script import common_fields, rank_command, render
from flwr_hpc.schedulers.slurm import failures, parse
from flwr_hpc.schedulers.slurm.rules import RULES


class SlurmScheduler(CommandScheduler):
    """One Slurm cluster; ``SLURM_CONF`` in the facility's `env` selects another than the host's."""

    rules = RULES
    cancels_by_name = True
    history_optional = True  # many clusters keep no accounting

    def script(self, spec: JobSpec) -> str:
        return script(spec)

    def submit_command(self, script: Path, folder: Path) -> list[str]:
        return ["sbatch", str(script)]

    def parse_submit(self, out: str) -> str:
        return parse.read_sbatch(out)

    def status_command(self, jobs: Sequence[dict[str, Any]]) -> list[str]:
        return _squeue("--jobs", _ids(jobs))

    def find_command(self, name: str) -> list[str]:
        return _squeue("--name", name)

    def parse_status(self, answer: Answer) -> list[JobInfo]:
        return parse.read_squeue(answer.out)

    def history_command(self, jobs: Sequence[dict[str, Any]]) -> list[str]:
        return ["sacct", *parse.SACCT, "-j", _ids(jobs)]

    def find_history_command(self, name: str) -> list[str]:
        return ["sacct", *parse.SACCT, "--name", name, "-S", "now-30days"]

    def parse_history(self, answer: Answer) -> list[JobInfo]:
        return parse.read_sacct(answer.out)

    def merge(self, now: JobInfo | None, then: JobInfo | None) -> JobInfo | None:
        return parse.merge(now, then)

    def cancel_command(self, job: dict[str, Any]) -> list[str]:
        return ["scancel", f"--jobname={job['name']}", job["id"]]

    def estimate_command(self) -> list[str]:
        return ["sbatch", "--test-only"]

    def parse_estimate(self, answer: Answer) -> float | None:
        return parse.read_start(answer.err)

    def classify(self, answer: Answer) -> Failure:
        return failures.classify(answer)


def make_scheduler(facility: FacilityConfig) -> SlurmScheduler:
    """Return the adapter to a facility's cluster."""
    return SlurmScheduler(facility)


def script(spec: JobSpec) -> str:
    """Return the batch script of a job; needs no Slurm."""
    f = spec.facility
    logs = str(spec.folder).replace("%", "%%")
    queue = queue_of(f)
    requeue = queue is not None and queue.preemptable and "no-requeue" not in f.options
    options = ({"requeue": ""} if requeue else {}) | f.options
    fields = {
        "placement": {k: v for k in PLACEMENT if (v := getattr(f, k))} | _gpus(f),
        "nodes": f.nodes,
        "ranks_per_node": f.ranks_per_node,
        "cpus_per_rank": f.cpus_per_rank,
        "walltime": f.walltime,
        "signal_s": max(1, min(90, walltime_s(f.walltime) // 10)),
        "options": [f"{k}={v}" if v else k for k, v in options.items()],
        "launcher_args": f.launcher_args,
        "command": rank_command(spec),
        "output": f"{logs}/%j_%t_log.out",
        "error": f"{logs}/%j_%t_log.err",
        "output_0": f"{logs}/%j_0_log.out",
        "error_0": f"{logs}/%j_0_log.err",
    }
    return render("slurm.sh.j2", common_fields(spec) | fields)


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


def _squeue(*which: str) -> list[str]:
    # With a user slurmctld sends that user's jobs alone, not the whole queue.
    return ["squeue", f"--user={os.getuid()}", *parse.SQUEUE, *which]


def _ids(jobs: Sequence[dict[str, Any]]) -> str:
    return ",".join(job["id"] for job in jobs)
