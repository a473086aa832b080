"""What a facility may ask of PBS, and PBS's words for people."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError, one_of
from flwr_hpc.schedulers.rules import Accounting, OwnAccounts, Rules

# What selects another server than the host's, given in the facility's `env`.
SERVER = ("PBS_SERVER", "PBS_CONF_FILE")
# Set where this runs inside a job itself; PBS_DPREFIX changes how directives begin.
INSIDE = ("PBS_JOBID", "PBS_ENVIRONMENT", "PBS_NODEFILE", "PBS_DPREFIX")
MPIS = ("mpich", "openmpi", "mpich-tmrsh")
FIELD_OF = {"select": "nodes and chunk", "walltime": "walltime"}
CHUNK = "with PBS the chunk says what a node must have: {key}.chunk"


def check(key: str, f: FacilityConfig) -> None:
    """Check launcher, resources and chunk against fields and what is forbidden here."""
    one_of(f"{key}.mpi", f.mpi, MPIS)
    for name in f.options:
        if name in FIELD_OF:
            raise UserError(
                f"{key}.options.{name} is set by a field. Use {key}.{FIELD_OF[name]} instead."
            )
        if not re.fullmatch(r"\w+", name):
            raise UserError(
                f"{key}.options: '{name}' is no resource, what stands after -l and before '='. "
                f"Example: {key}.options.filesystems=home"
            )
    if f.chunk and not re.fullmatch(r"\w+=[^\s:+]+(:\w+=[^\s:+]+)*", f.chunk):
        raise UserError(
            f"{key}.chunk='{f.chunk}' is not what one node asks for, without their number. "
            f"Example: {key}.chunk='ncpus=32:ngpus=4:mpiprocs=4'"
        )
    if not (f.workdir or "").isascii():
        raise UserError(
            f"{key}.workdir={f.workdir}: PBS takes no job whose files are to lie in a path with "
            f"letters beyond ASCII ('illegal -o value'). Use {key}.workdir=/another/path"
        )
    asked = [part.partition("=")[0] for part in (f.chunk or "").split(":")]
    for name in [*f.options, *asked]:
        if name in f.forbidden:
            raise UserError(
                f"{key}: a job here must never ask for {name} (its file forbids "
                f"{', '.join(f.forbidden)}). Leave it out of {key}.options and {key}.chunk"
            )


def environment(f: FacilityConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the commands' environment, without that of a job this runs in."""
    env = {k: v for k, v in inherited.items() if k not in INSIDE}
    return env | {"LC_ALL": "C"} | {k: f.env[k] for k in SERVER if k in f.env}


RULES = Rules(
    title="PBS",
    fields=("chunk", "mpi"),
    instead={
        "qos": "PBS knows no QOS; its queue is {key}.partition",
        "constraint": CHUNK,
        "reservation": "a reservation of PBS is a queue: {key}.partition={value}",
        "gpu_request": CHUNK,
        "gpu_type": CHUNK,
    },
    check=check,
    environment=environment,
    advice="account, partition (the queue), walltime, chunk and options",
    programs=("qsub", "qstat", "qdel"),
    trial=False,
    refusals={
        r"held": "options may hold it; if not, somebody at the centre does: ask there",
        r"account": "account=NAME; limits: qstat -Qf",
        r"unknown queue|queue is not enabled|no route": (
            "partition=NAME (the queue); there are: qstat -Q"
        ),
        r"limit|policy|violates|exceed": (
            "nodes, walltime or another partition (the queue); limits: qstat -Qf"
        ),
        r"walltime": "walltime=HH:MM:SS; limits: qstat -Qf",
        r"queue\b": "partition=NAME (the queue); there are: qstat -Q",
        r"resource|chunk|select|node|ncpus|ngpus|memory": (
            "chunk, options, nodes, gpus_per_node or cpus_per_rank; what there is: pbsnodes -a"
        ),
    },
    accounting=Accounting(
        ("qstat", "-x", "1"),  # whether there is such a job or not
        "runs go on without; of a job that has ended it is only known that it has, not how. The "
        "centre can set the server's job_history_enable",
        none="not configured to maintain job history",
    ),
    own_accounts=OwnAccounts(("PBS_ACCOUNT",)),  # PBS itself keeps no list of them
    other_cluster="env.PBS_SERVER=NAME",
)
