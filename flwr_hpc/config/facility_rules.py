"""How a facility's fields have to go together; every mistake is answered with its fix."""

from __future__ import annotations

import re
from dataclasses import replace

from flwr_hpc.config.facility import (
    PLACEMENT,
    QUEUE,
    FacilityConfig,
    QueueConfig,
    queue_of,
    rows,
    walltime_s,
)
from flwr_hpc.errors import UserError, not_negative, one_of, positive

SCHEDULERS = ("local", "slurm", "pbs")
GPU_REQUESTS = ("gres", "gpus", "gpus-per-node", "gpus-per-task")
GPU_VENDORS = ("nvidia", "amd", "intel")
MPIS = ("mpich", "openmpi")
# sbatch options that a field of the facility sets.
FIELD_OF = {
    **{option: option for option in PLACEMENT},
    "nodes": "nodes",
    "ntasks-per-node": "ranks_per_node",
    "cpus-per-task": "cpus_per_rank",
    "time": "walltime",
}
# Fields that say nothing to the other batch system, and what does.
SLURM_ALONE = {
    "qos": "PBS knows no QOS; its queue is {key}.partition",
    "constraint": "with PBS the chunk says what a node must have: {key}.chunk",
    "reservation": "a reservation of PBS is a queue: {key}.partition={value}",
    "gpu_type": "with PBS the chunk says what a node must have: {key}.chunk",
    "sbatch": "resources of PBS go into {key}.qsub, e.g. {key}.qsub.filesystems=home",
    "srun_args": "with PBS mpiexec starts the ranks: {key}.mpiexec_args",
}
PBS_ALONE = {
    "chunk": "with Slurm {key}.gpu_request, gpu_type and constraint say what a node must have",
    "qsub": "options of sbatch go into {key}.sbatch",
    "mpiexec_args": "with Slurm srun starts the ranks: {key}.srun_args",
}


def check_facility(name: str, f: FacilityConfig) -> None:
    """Check a facility's fields and how they go together."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name):
        raise UserError(f"facility name '{name}' may hold letters, digits and '_' only")
    one_of(f"facilities.{name}.scheduler", f.scheduler, SCHEDULERS)
    for key in ("nodes", "ranks_per_node", "cpus_per_rank"):
        positive(f"facilities.{name}.{key}", getattr(f, key))
    positive(f"facilities.{name}.poll_s", f.poll_s)
    not_negative(f"facilities.{name}.gpus_per_node", f.gpus_per_node)
    for queue in f.queues:
        walltime_s(queue.walltime or "1")
    _check_walltime(f"facilities.{name}.walltime", f.walltime)
    if f.scheduler == "local" and f.nodes != 1:
        raise UserError(f"facilities.{name}.nodes={f.nodes}: a local facility has one node")
    one_of(f"facilities.{name}.gpu_request", f.gpu_request, GPU_REQUESTS)
    one_of(f"facilities.{name}.gpu_vendor", f.gpu_vendor, GPU_VENDORS)
    one_of(f"facilities.{name}.mpi", f.mpi, MPIS)
    _check_foreign(f"facilities.{name}", f)
    _check_required(f"facilities.{name}", f)
    _check_shape(f"facilities.{name}", f)
    (_check_resources if f.scheduler == "pbs" else _check_options)(f"facilities.{name}", f)
    _check_queue(f"facilities.{name}", f)


def _check_walltime(key: str, text: str) -> None:
    try:
        seconds = walltime_s(text)
    except UserError:
        raise UserError(
            f"{key}={text} is not HH:MM:SS or D-HH:MM:SS. Example: {key}=02:30:00"
        ) from None
    if seconds <= 0:
        raise UserError(f"{key}={text} must be longer than zero")


def _check_required(key: str, f: FacilityConfig) -> None:
    for name in f.required:
        if getattr(f, name, None) is None:
            known = {str(getattr(q, name)) for q in f.queues if getattr(q, name, None)}
            listed = f" Known: {', '.join(sorted(known))}." if known else ""
            raise UserError(
                f"{key}.{name} must be given.{listed} Add it to the command: {key}.{name}=VALUE"
            )


def _check_shape(key: str, f: FacilityConfig) -> None:
    """Check that ranks, GPUs and CPUs go together on a node."""
    if 0 < f.gpus_per_node < f.ranks_per_node:
        raise UserError(
            f"{key}.ranks_per_node={f.ranks_per_node} is more than its {f.gpus_per_node} GPUs per "
            f"node: a rank drives one GPU. Add to the command: "
            f"{key}.ranks_per_node={f.gpus_per_node}"
        )
    if f.gpu_request == "gpus-per-task" and f.gpus_per_node % f.ranks_per_node:
        raise UserError(
            f"{key}.gpu_request=gpus-per-task cannot deal {f.gpus_per_node} GPUs out to "
            f"{f.ranks_per_node} ranks. Add to the command: {key}.ranks_per_node={f.gpus_per_node}"
        )
    cpus = f.ranks_per_node * f.cpus_per_rank
    if f.cpus_per_node is not None and cpus > f.cpus_per_node:
        most = f.cpus_per_node // f.ranks_per_node
        fix = f"cpus_per_rank={most}" if most else f"ranks_per_node={f.cpus_per_node}"
        raise UserError(
            f"{key}: {f.ranks_per_node} ranks x {f.cpus_per_rank} CPUs are {cpus} CPUs; a node has "
            f"{f.cpus_per_node} for jobs. Add to the command: {key}.{fix}"
        )


def _check_options(key: str, f: FacilityConfig) -> None:
    """Check the scheduler options against those that have a field or are forbidden here."""
    own = FIELD_OF | ({f.gpu_request: "gpus_per_node"} if f.gpus_per_node else {})
    for option in f.sbatch:
        if option in own:
            raise UserError(
                f"{key}.sbatch.{option} is set by a field. Use {key}.{own[option]} instead."
            )
        if not re.fullmatch(r"[a-z][a-z0-9-]*", option):
            raise UserError(
                f"{key}.sbatch: '{option}' is no long option of sbatch without its dashes. "
                f"Example: {key}.sbatch.mem=100G"
            )
    used = [option for option in PLACEMENT if getattr(f, option)]
    used += [f.gpu_request] if f.gpus_per_node else []
    for option in [*used, *f.sbatch]:
        if option in f.forbidden:
            raise UserError(
                f"{key}: a job here must never set --{option} (its file forbids "
                f"{', '.join(f.forbidden)}). {_instead(key, f, option)}"
            )


def _check_foreign(key: str, f: FacilityConfig) -> None:
    """Refuse what the facility's batch system would never be told."""
    foreign = {"slurm": PBS_ALONE, "pbs": SLURM_ALONE}.get(f.scheduler, {})
    for name, instead in foreign.items():
        if (value := getattr(f, name)) not in (None, [], {}):
            raise UserError(
                f"{key}.{name}={value} has no meaning with scheduler={f.scheduler}. Leave it out: "
                f"{instead.format(key=key, value=value)}"
            )


def _check_resources(key: str, f: FacilityConfig) -> None:
    """Check what is asked of PBS against what has a field or is forbidden here."""
    fields = {"select": "nodes and chunk", "walltime": "walltime"}
    for name in f.qsub:
        if name in fields:
            raise UserError(
                f"{key}.qsub.{name} is set by a field. Use {key}.{fields[name]} instead."
            )
        if not re.fullmatch(r"\w+", name):
            raise UserError(
                f"{key}.qsub: '{name}' is no resource, what stands after -l and before '='. "
                f"Example: {key}.qsub.filesystems=home"
            )
    if f.chunk and not re.fullmatch(r"\w+=[^\s:+]+(:\w+=[^\s:+]+)*", f.chunk):
        raise UserError(
            f"{key}.chunk='{f.chunk}' is not what one node asks for, without their number. "
            f"Example: {key}.chunk='ncpus=32:ngpus=4:mpiprocs=4'"
        )
    asked = [part.partition("=")[0] for part in (f.chunk or "").split(":")]
    for name in [*f.qsub, *asked]:
        if name in f.forbidden:
            raise UserError(
                f"{key}: a job here must never ask for {name} (its file forbids "
                f"{', '.join(f.forbidden)}). Leave it out of {key}.qsub and {key}.chunk"
            )


def _instead(key: str, f: FacilityConfig, option: str) -> str:
    if option in f.sbatch:
        return f"Leave out {key}.sbatch.{option}"
    if option in PLACEMENT:
        return f"Leave it out, or add to the command: {key}.{option}=null"
    allowed = [request for request in GPU_REQUESTS if request not in f.forbidden]
    return f"Add to the command: {key}.gpu_request={' or '.join(allowed)}"


def _check_queue(key: str, f: FacilityConfig) -> None:
    """Check nodes and walltime against the queue, and name the queues that would take them."""
    known = rows(f)
    queue = queue_of(f)
    nodes = "1 node" if f.nodes == 1 else f"{f.nodes} nodes"
    if not known or (queue is not None and _gives(queue, f.walltime)):
        return
    name = " ".join(f"{n} {v}" for n in QUEUE if (v := getattr(f, n))) or "the default partition"
    if queue is None:
        spans = ", ".join(f"{q.min_nodes} to {q.max_nodes or 'any number of'}" for q in known)
        ends = [n for q in known for n in (q.min_nodes, q.max_nodes) if n is not None]
        found = f"nodes={f.nodes}: {name} takes {spans} nodes"
        fix = f"nodes={min(ends, key=lambda n: abs(n - f.nodes))}"
    else:
        found = f"walltime={f.walltime}: {name} gives {nodes} at most {queue.walltime}"
        fix = f"walltime={queue.walltime}"
    others = "; ".join(_choose(key, f, q) for q in f.queues if _would_do(q, f))
    more = f" Or one of the queues that take {nodes} for {f.walltime}: {others}"
    raise UserError(f"{key}.{found}. Add to the command: {key}.{fix}.{more if others else ''}")


def _gives(queue: QueueConfig, walltime: str) -> bool:
    return queue.walltime is None or walltime_s(walltime) <= walltime_s(queue.walltime)


def _would_do(queue: QueueConfig, f: FacilityConfig) -> bool:
    there = replace(f, partition=queue.partition, qos=queue.qos)
    return queue_of(there) is queue and _gives(queue, f.walltime)


def _choose(key: str, f: FacilityConfig, queue: QueueConfig) -> str:
    wanted = {n: getattr(queue, n) for n in QUEUE if getattr(queue, n) != getattr(f, n)}
    return " ".join(f"{key}.{n}={value or 'null'}" for n, value in wanted.items())
