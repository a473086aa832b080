"""Job scripts from templates: a pure function of the fields."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flwr_hpc
from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.schedulers.base import JobSpec, checkout

MPI_RANK = "flwr_hpc.schedulers.mpi_rank"  # Module of a rank that mpiexec starts
# Of apptainer and singularity; Intel's devices are in /dev, which they see anyway.
GPU_FLAG = {"nvidia": ["--nv"], "amd": ["--rocm"], "intel": []}


def render(template_name: str, fields: Mapping[str, Any], beside: str = "") -> str:
    """Return a job script.

    Parameters
    ----------
    template_name : str
        File in ``slurm_templates/``, or else in the folder `beside`.
    fields : mapping
        Every name the template uses; one too few is an error, not an empty string.
    beside : str
        Folder of a batch system that brings its own template.
    """
    # Not at the top: every message to a site starts a process, and few of them submit a job.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader([templates_dir(), *([beside] if beside else [])]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters["sh"] = lambda value: shlex.quote(str(value))
    return env.get_template(template_name).render(fields)


def templates_dir() -> Path:
    """Return the folder of the shipped templates, installed or in a checkout."""
    package = Path(flwr_hpc.__file__).resolve().parent
    installed = package / "slurm_templates"
    return installed if installed.is_dir() else package.parent / "slurm_templates"


def common_fields(spec: JobSpec) -> dict[str, Any]:
    """Return what every template starts from: name, set-up lines, environment, checkout."""
    offline = {} if spec.facility.internet else {"HF_HUB_OFFLINE": "1"}
    return {
        "name": spec.name,
        "setup": spec.facility.setup,
        "env": offline | job_env(spec),
        "checkout": checkout(),
    }


def job_env(spec: JobSpec) -> dict[str, str]:
    """Environment every job gets; the facility's own settings win."""
    facility = spec.facility
    return {
        "OMP_NUM_THREADS": str(facility.cpus_per_rank),
        "PYTHONUNBUFFERED": "1",
        **facility.env,
        **spec.env,
        "FLWR_HPC_JOB": spec.name,
        "FLWR_HPC_WALLTIME_S": str(walltime_s(facility.walltime)),
    }


def rank_command(spec: JobSpec, module: str = "submitit.core._submit") -> str:
    """Return the shell command of one rank: submitit's, in the facility's container if any."""
    facility = spec.facility
    python = facility.python or ("python3" if facility.container else sys.executable)
    command = [python, "-u", "-m", module, str(spec.folder)]
    if facility.container:
        binds = [part for folder in spec.binds for part in ("--bind", folder)]
        gpus = GPU_FLAG[facility.gpu_vendor] if facility.gpus_per_node else []
        runtime = [facility.container_runtime, "exec", *gpus, *binds, facility.container]
        command = runtime + command
    return shlex.join(command)


def mpi_env(f: FacilityConfig) -> dict[str, str]:
    """Return what `flwr_hpc.schedulers.mpi_rank` has to know of the job's shape."""
    return {
        "SUBMITIT_LOCAL_JOB_NUM_NODES": str(f.nodes),
        "SUBMITIT_LOCAL_NTASKS": str(f.nodes * f.ranks_per_node),
    }
