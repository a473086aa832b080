"""``python -m flwr_hpc.schedulers.mpi_rank FOLDER``: a rank that mpiexec starts.

submitit learns its rank from the environment, and every launcher names it in its own way. Here
they become the variables of submitit's local jobs: a plug-in of ours would have to be installed,
and jobs also run from a checkout. What a rank prints goes to files of its own, as srun has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from submitit.core.submission import process_job

from flwr_hpc.schedulers.pbs.parse import duration_s, qstat

# Hydra (MPICH, Intel MPI), HPE Cray PALS, Open MPI; any other that speaks PMIx.
RANK = ("PMI_RANK", "PALS_RANKID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL_RANK = (
    "MPI_LOCALRANKID",
    "PMI_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
)
# The job's id; the template of a batch system that is not here exports the first.
JOB_ID = ("FLWR_HPC_JOB_ID", "PBS_JOBID")
NTASKS, NODES = "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_JOB_NUM_NODES"
ASK_S = 10.0


def place(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that tell submitit which rank this is.

    Raises
    ------
    RuntimeError
        If mpiexec started something else than the ranks of the job.
    """
    world = int(env[NTASKS])
    per_node = max(1, world // int(env[NODES]))
    rank, size = _first(env, RANK), _first(env, SIZE)
    if rank is None and world > 1:
        raise RuntimeError(f"mpiexec tells no rank: none of {', '.join(RANK)} is set")
    if size is not None and size != world:
        raise RuntimeError(
            f"mpiexec started {size} ranks that belong together, not {world}: is it that of the "
            f"MPI named by the facility's mpi field?"
        )
    rank = rank or 0
    local = _first(env, LOCAL_RANK)
    return {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": next(env[key] for key in JOB_ID if env.get(key)),
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank % per_node if local is None else local),
        "SUBMITIT_LOCAL_NODEID": str(rank // per_node),
    }


def granted_s(text: str) -> float | None:
    """Read the walltime the job was granted in qstat's answer; None if it is not there."""
    try:
        (job,) = json.loads(text, strict=False)["Jobs"].values()
        return duration_s(job["Resource_List"]["walltime"])
    except (ValueError, KeyError, TypeError):
        return None


def main(folder: str) -> None:
    """Be one rank."""
    os.environ.update(place(os.environ))
    rank, job_id = os.environ["SUBMITIT_LOCAL_GLOBALID"], os.environ["SUBMITIT_LOCAL_JOB_ID"]
    _print_to(Path(folder) / f"{job_id}_{rank}_log")
    if rank == "0" and "PBS_JOBID" in os.environ:  # rank 0 watches the clock, PBS tells no end
        _shorten(job_id)
    process_job(folder)


def _shorten(job_id: str) -> None:
    """Correct the walltime if PBS granted less; nodes that reach no server do without."""
    try:
        done = subprocess.run(
            qstat(job_id), capture_output=True, text=True, timeout=ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    granted, asked = granted_s(done.stdout), float(os.environ["FLWR_HPC_WALLTIME_S"])
    if granted is not None and granted < asked:
        os.environ["FLWR_HPC_WALLTIME_S"] = f"{granted:g}"


def _print_to(path: Path) -> None:
    for suffix, descriptor in ((".out", 1), (".err", 2)):
        with open(f"{path}{suffix}", "ab") as f:  # a job that was put back goes on in its files
            os.dup2(f.fileno(), descriptor)


def _first(env: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((int(env[name]) for name in names if env.get(name)), None)


if __name__ == "__main__":
    main(sys.argv[1])
