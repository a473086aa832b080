"""What a facility may ask of Slurm, and Slurm's words for people."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flwr_hpc.config.facility import PLACEMENT, FacilityConfig
from flwr_hpc.errors import UserError, one_of
from flwr_hpc.schedulers.rules import Accounting, OwnAccounts, Rules

GPU_REQUESTS = ("gres", "gpus", "gpus-per-node", "gpus-per-task")
# sbatch options that a field of the facility sets.
FIELD_OF = {
    **{option: option for option in PLACEMENT},
    "nodes": "nodes",
    "ntasks-per-node": "ranks_per_node",
    "cpus-per-task": "cpus_per_rank",
    "time": "walltime",
}
ACCOUNTS = "sacctmgr show assoc user=$USER format=account%30,partition,qos%60"
PARTITIONS = "sinfo -o '%P %l %D'"
NODES = "sinfo -o '%P %D %c %m %G'"


def check(key: str, f: FacilityConfig) -> None:
    """Check the request for GPUs, and sbatch's options against fields and what is forbidden."""
    one_of(f"{key}.gpu_request", f.gpu_request, GPU_REQUESTS)
    if f.gpu_request == "gpus-per-task" and f.gpus_per_node % f.ranks_per_node:
        raise UserError(
            f"{key}.gpu_request=gpus-per-task cannot deal {f.gpus_per_node} GPUs out to "
            f"{f.ranks_per_node} ranks. Add to the command: {key}.ranks_per_node={f.gpus_per_node}"
        )
    _check_options(key, f)
    used = [option for option in PLACEMENT if getattr(f, option)]
    used += [f.gpu_request] if f.gpus_per_node else []
    for option in [*used, *f.options]:
        if option in f.forbidden:
            raise UserError(
                f"{key}: a job here must never set --{option} (its file forbids "
                f"{', '.join(f.forbidden)}). {_instead(key, f, option)}"
            )


def _check_options(key: str, f: FacilityConfig) -> None:
    own = FIELD_OF | ({f.gpu_request: "gpus_per_node"} if f.gpus_per_node else {})
    for option in f.options:
        if option in own:
            raise UserError(
                f"{key}.options.{option} is set by a field. Use {key}.{own[option]} instead."
            )
        if not re.fullmatch(r"[a-z][a-z0-9-]*", option):
            raise UserError(
                f"{key}.options: '{option}' is no long option of sbatch without its dashes. "
                f"Example: {key}.options.mem=100G"
            )


def _instead(key: str, f: FacilityConfig, option: str) -> str:
    if option in f.options:
        return f"Leave out {key}.options.{option}"
    if option in PLACEMENT:
        return f"Leave it out, or add to the command: {key}.{option}=null"
    allowed = [request for request in GPU_REQUESTS if request not in f.forbidden]
    return f"Add to the command: {key}.gpu_request={' or '.join(allowed)}"


def environment(f: FacilityConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the commands' environment, without what would change what they do.

    That is what a job this runs in has set, and what sbatch puts above the script: a user's or
    site's default stays where the facility says nothing of the kind.
    """
    defaults = {f"SBATCH_{key.upper()}" for key in PLACEMENT if not getattr(f, key)}
    inside = "SLURM_" if "SLURM_JOB_ID" in inherited else "SBATCH_"
    kept = defaults | {"SLURM_CONF", "SLURM_CLUSTERS"}
    env = {k: v for k, v in inherited.items() if k in kept or not k.startswith((inside, "SBATCH_"))}
    conf = f.env.get("SLURM_CONF")
    return env | {"SLURM_TIME_FORMAT": "%s"} | ({"SLURM_CONF": conf} if conf else {})


RULES = Rules(
    title="Slurm",
    fields=("qos", "constraint", "reservation", "gpu_request", "gpu_type"),
    instead={
        "chunk": "with Slurm {key}.gpu_request, gpu_type and constraint say what a node must have",
        "mpi": "with Slurm srun starts the ranks: {key}.launcher_args",
    },
    check=check,
    environment=environment,
    advice="account, partition, qos, walltime and sizes",
    programs=("sbatch", "squeue", "scancel", "srun"),
    refusals={
        r"held": "options may hold it; if not, somebody at the centre does: ask there",
        r"policy|assoc": f"nodes, walltime, or another account or qos; your limits: {ACCOUNTS}",
        r"account": f"account=NAME; yours: {ACCOUNTS}",
        r"partition|queue": f"partition=NAME; there are: {PARTITIONS}",
        r"qos": f"qos=NAME; yours: {ACCOUNTS}",
        r"time ?limit|walltime": f"walltime=HH:MM:SS; limits: {PARTITIONS}",
        r"reservation": "reservation=NAME, or null",
        r"node|gres|cpu|processor|memory": (
            f"nodes, gpus_per_node, gpu_request, gpu_type or cpus_per_rank; what there is: {NODES}"
        ),
    },
    accounting=Accounting(
        ("sacct", "-X", "-n", "-o", "JobID", "-S", "now"),
        "runs go on without; what slurmctld has forgotten of a job (after its MinJobAge) is lost. "
        "The centre can enable accounting",
    ),
    own_accounts=OwnAccounts(
        ("SBATCH_ACCOUNT", "SLURM_ACCOUNT"),
        ("sacctmgr", "-nP", "show", "assoc", "user={user}", "format=account"),
        without="not running a supported accounting_storage plugin",
    ),
    other_cluster="env.SLURM_CONF=/path/to/slurm.conf",
)
