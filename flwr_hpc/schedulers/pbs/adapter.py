"""Jobs on PBS Professional (OpenPBS): its commands, and the job script.

A job is identified by its id and its full name. ``-N`` takes 15 or 236 characters, depending on
the server's age, so the name travels in the job's environment (``-v``), where qstat shows it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import Failure, JobInfo, JobSpec
from flwr_hpc.schedulers.command import Answer, CommandScheduler, number
from flwr_hpc.schedulers.pbs import failures, parse
from flwr_hpc.schedulers.pbs.rules import RULES
from flwr_hpc.schedulers.script import MPI_RANK, common_fields, mpi_env, rank_command, render

TMRSH = "mpich-tmrsh"  # An MPICH that was built without PBS, as Debian's
PER_NODE = {
    "mpich": "-ppn {}",
    "openmpi": "--map-by ppr:{}:node",
    TMRSH: '-f "$PBS_NODEFILE" -launcher rsh -launcher-exec {folder}/tmrsh -ppn {}',
}


class PbsScheduler(CommandScheduler):
    """One PBS server; ``PBS_SERVER`` in the facility's `env` selects another than the host's.

    Living jobs are asked for without the history: a server that keeps none would name no job.
    """

    rules = RULES
    history_of_many = False

    def script(self, spec: JobSpec) -> str:
        return script(spec)

    def submit_command(self, script: Path, folder: Path) -> list[str]:
        # The script's directives could quote no path.
        return ["qsub", "-o", str(folder / "pbs.out"), str(script)]

    def parse_submit(self, out: str) -> str:
        return parse.read_qsub(out)

    def status_command(self, jobs: Sequence[dict[str, Any]]) -> list[str]:
        return parse.qstat(jobs[0]["id"] if len(jobs) == 1 else "")

    def find_command(self, name: str) -> list[str]:
        return parse.qstat()

    def parse_status(self, answer: Answer) -> list[JobInfo]:
        return parse.read_qstat(answer)

    def history_command(self, jobs: Sequence[dict[str, Any]]) -> list[str]:
        return parse.qstat(jobs[0]["id"], history=True)

    def find_history_command(self, name: str) -> list[str]:
        return parse.qstat(history=True)

    def parse_history(self, answer: Answer) -> list[JobInfo] | None:
        return None if failures.keeps_no_history(answer) else parse.read_qstat(answer)

    def cancel_command(self, job: dict[str, Any]) -> list[str]:
        return ["qdel", job["id"]]

    def classify(self, answer: Answer) -> Failure:
        return failures.classify(answer)

    def identity(self, job_id: str) -> str:
        return str(number(job_id))  # a server may go by more than one name

    def age(self, info: JobInfo) -> tuple[float, ...]:
        return (number(info.id),)  # of a job put back PBS keeps no time of submission


def make_scheduler(facility: FacilityConfig) -> PbsScheduler:
    """Return the adapter to a facility's server."""
    return PbsScheduler(facility)


def script(spec: JobSpec) -> str:
    """Return the job script; needs no PBS."""
    check(spec)
    f = spec.facility
    common = common_fields(spec)
    fields = {
        "short_name": parse.short_name(spec.name),
        "name_variable": parse.NAME,
        "placement": {k: v for k, v in (("q", f.partition), ("A", f.account)) if v},
        "select": ":".join(filter(None, (str(f.nodes), _chunk(f)))),
        "resources": {"place": "scatter"} | f.options,
        "walltime": _hms(walltime_s(f.walltime)),
        "folder": spec.folder,
        "env": common["env"] | mpi_env(f),
        "tmrsh": f.mpi == TMRSH,
        "launch": _launch(spec),
        "command": rank_command(spec, MPI_RANK),
    }
    return render("pbs.sh.j2", common | fields)


def _launch(spec: JobSpec) -> str:
    """Return the shell words that start the ranks."""
    f, folder = spec.facility, shlex.quote(str(spec.folder))
    per_node = PER_NODE[f.mpi].format(f.ranks_per_node, folder=folder)
    args = [shlex.join(f.launcher_args)] if f.launcher_args else []
    return " ".join([f"mpiexec -n {f.nodes * f.ranks_per_node}", per_node, *args])


def check(spec: JobSpec) -> None:
    """Refuse what qsub would answer with its usage, or take for something else."""
    if re.search(r"[^\w.+@-]", spec.name, re.ASCII):
        raise UserError(
            f"the job's name '{spec.name}' is given to PBS in a list of variables, where only "
            "letters, digits and . _ + @ - are safe. Name the facility, and the run directory if "
            "its name is part of it, without others"
        )
    if not str(spec.folder).isascii():
        raise UserError(
            f"PBS takes no job whose files are to lie in {spec.folder}: it knows no letters beyond "
            "ASCII in a path ('illegal -o value'). Set the facility's workdir, or run_dir, to "
            "another path"
        )


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
