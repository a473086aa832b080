"""A facility as data: one HPC centre's batch system, hardware and rules, validated."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from flwr_hpc.errors import UserError, not_negative, one_of, positive

__all__ = ["FacilityConfig", "PLACEMENT", "QueueConfig", "check_facility", "queue_of", "walltime_s"]

SCHEDULERS = ("local", "slurm")
GPU_REQUESTS = ("gres", "gpus", "gpus-per-node", "gpus-per-task")
GPU_VENDORS = ("nvidia", "amd")
QUEUE = ("partition", "qos")
PLACEMENT = ("account", *QUEUE, "constraint", "reservation")
# sbatch options that a field of the facility sets.
FIELD_OF = {
    **{option: option for option in PLACEMENT},
    "nodes": "nodes",
    "ntasks-per-node": "ranks_per_node",
    "cpus-per-task": "cpus_per_rank",
    "time": "walltime",
}


@dataclass
class QueueConfig:
    """A way into a facility: what a partition and QOS let a job of some node count have.

    Attributes
    ----------
    partition, qos : str or None
        The row speaks of jobs that ask for exactly these.
    min_nodes, max_nodes : int, int or None
        Node counts it speaks of; of several rows the first that fits holds, so that a
        walltime limit can be a function of the node count.
    walltime : str or None
        The longest that may be asked for (None: not known).
    preemptable : bool
        Jobs may be put back in the queue to make room; they are submitted with ``--requeue``.
    """

    partition: str | None = None
    qos: str | None = None
    min_nodes: int = 1
    max_nodes: int | None = None
    walltime: str | None = None
    preemptable: bool = False


@dataclass
class FacilityConfig:
    """One HPC centre as data: how to get an allocation there and what it is made of.

    Attributes
    ----------
    scheduler : str
        ``local`` (submitit's local executor) or ``slurm``.
    account, partition, qos, constraint, reservation : str or None
        Passed to the scheduler when set; a batch system must be given `account`, if only as
        null.
    nodes, ranks_per_node, gpus_per_node, cpus_per_rank : int
        Shape of one allocation; world size = nodes x ranks_per_node.
    gpu_request : str
        How this centre asks for GPUs: ``gres``, ``gpus``, ``gpus-per-node`` or
        ``gpus-per-task``.
    gpu_type : str or None
        Goes into the request where GPUs are asked for by type, as in ``gres=gpu:a100:4``.
    gpu_vendor : str
        ``nvidia`` or ``amd``: what a container is given to reach them.
    walltime : str
        ``HH:MM:SS`` or ``D-HH:MM:SS``.
    queues : list of QueueConfig
        What is known of partitions and QOS; a choice that is not among them is not checked.
    required : list of str
        Fields that must be given here besides `account`, e.g. ``qos``.
    forbidden : list of str
        sbatch options that jobs here must never set, e.g. ``mem``.
    workdir : str or None
        Folder on the facility's shared file system; default: in the run directory.
    python : str or None
        Interpreter on the compute nodes; default: the one that runs this.
    setup : list of str
        Shell lines before the worker starts: modules, virtual environment.
    env : dict of str to str
        Environment of the job, e.g. ``NCCL_SOCKET_IFNAME``.
    container : str or None
        Image the worker runs in, by ``container_runtime`` (apptainer, singularity).
    sbatch : dict of str to str
        Further scheduler options, verbatim.
    srun_args : list of str
    peak_tflops : float or None
        Peak dense bf16 TFLOP/s of one device, for MFU.
    gpu_memory_gb : float or None
        Memory of one device.
    network_gb_s : float or None
        Injection bandwidth of a node into the interconnect, in GB/s.
    cpus_per_node : int or None
        CPUs of a node that jobs may use, as the scheduler counts them.
    internet : bool
        Whether compute nodes reach outside (else Hugging Face is put in offline mode).
    """

    scheduler: str = "slurm"
    account: str | None = MISSING
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int = 1
    gpu_request: str = "gres"
    gpu_type: str | None = None
    gpu_vendor: str = "nvidia"
    walltime: str = "01:00:00"
    queues: list[QueueConfig] = field(default_factory=list)
    required: list[str] = field(default_factory=list)
    forbidden: list[str] = field(default_factory=list)
    workdir: str | None = None
    python: str | None = None
    setup: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    container: str | None = None
    container_runtime: str = "apptainer"
    sbatch: dict[str, str] = field(default_factory=dict)
    srun_args: list[str] = field(default_factory=list)
    peak_tflops: float | None = None
    gpu_memory_gb: float | None = None
    network_gb_s: float | None = None
    cpus_per_node: int | None = None
    internet: bool = False


def walltime_s(text: str) -> int:
    """Return the seconds of a Slurm walltime: ``MM``, ``MM:SS``, ``HH:MM:SS``, ``D-HH[:MM[:SS]]``.

    Raises
    ------
    UserError
        If the text is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise UserError(f"walltime '{text}' is not HH:MM:SS or D-HH:MM:SS. Example: 02:30:00")
    days, *rest = match.groups()
    numbers = [int(n) for n in rest if n is not None]
    if days is not None:  # D-HH[:MM[:SS]]
        units = [3600, 60, 1]
    elif len(numbers) == 1:  # MM
        units = [60]
    else:  # MM:SS or HH:MM:SS
        units = [60, 1] if len(numbers) == 2 else [3600, 60, 1]
    return int(days or 0) * 86400 + sum(n * u for n, u in zip(numbers, units, strict=False))


def queue_of(f: FacilityConfig) -> QueueConfig | None:
    """Return the first of the facility's queues that its partition, QOS and nodes fit."""
    fits = (q for q in _rows(f) if q.min_nodes <= f.nodes <= (q.max_nodes or f.nodes))
    return next(fits, None)


def check_facility(name: str, f: FacilityConfig) -> None:
    """Check a facility's fields and how they go together.

    Raises
    ------
    UserError
        Naming the key, the value found and the corrected override.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name):
        raise UserError(f"facility name '{name}' may hold letters, digits and '_' only")
    one_of(f"facilities.{name}.scheduler", f.scheduler, SCHEDULERS)
    for key in ("nodes", "ranks_per_node", "cpus_per_rank"):
        positive(f"facilities.{name}.{key}", getattr(f, key))
    not_negative(f"facilities.{name}.gpus_per_node", f.gpus_per_node)
    for queue in f.queues:
        walltime_s(queue.walltime or "1")
    if walltime_s(f.walltime) <= 0:
        raise UserError(f"facilities.{name}.walltime={f.walltime} must be longer than zero")
    if f.scheduler == "local" and f.nodes != 1:
        raise UserError(f"facilities.{name}.nodes={f.nodes}: a local facility has one node")
    one_of(f"facilities.{name}.gpu_request", f.gpu_request, GPU_REQUESTS)
    one_of(f"facilities.{name}.gpu_vendor", f.gpu_vendor, GPU_VENDORS)
    _check_required(f"facilities.{name}", f)
    _check_shape(f"facilities.{name}", f)
    _check_options(f"facilities.{name}", f)
    _check_queue(f"facilities.{name}", f)


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
        mend = f"cpus_per_rank={most}" if most else f"ranks_per_node={f.cpus_per_node}"
        raise UserError(
            f"{key}: {f.ranks_per_node} ranks x {f.cpus_per_rank} CPUs are {cpus} CPUs; a node has "
            f"{f.cpus_per_node} for jobs. Add to the command: {key}.{mend}"
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


def _instead(key: str, f: FacilityConfig, option: str) -> str:
    if option in f.sbatch:
        return f"Leave out {key}.sbatch.{option}"
    if option in PLACEMENT:
        return f"Leave it out, or add to the command: {key}.{option}=null"
    allowed = [request for request in GPU_REQUESTS if request not in f.forbidden]
    return f"Add to the command: {key}.gpu_request={' or '.join(allowed)}"


def _check_queue(key: str, f: FacilityConfig) -> None:
    """Check nodes and walltime against the queue, and name the queues that would take them."""
    rows = _rows(f)
    queue = queue_of(f)
    nodes = "1 node" if f.nodes == 1 else f"{f.nodes} nodes"
    if not rows or (queue is not None and _gives(queue, f.walltime)):
        return
    name = " ".join(f"{n} {v}" for n in QUEUE if (v := getattr(f, n))) or "the default partition"
    if queue is None:
        spans = ", ".join(f"{q.min_nodes} to {q.max_nodes or 'any number of'}" for q in rows)
        ends = [n for q in rows for n in (q.min_nodes, q.max_nodes) if n is not None]
        found = f"nodes={f.nodes}: {name} takes {spans} nodes"
        mend = f"nodes={min(ends, key=lambda n: abs(n - f.nodes))}"
    else:
        found = f"walltime={f.walltime}: {name} gives {nodes} at most {queue.walltime}"
        mend = f"walltime={queue.walltime}"
    others = "; ".join(_choose(key, f, q) for q in f.queues if _would_do(q, f))
    more = f" Or one of the queues that take {nodes} for {f.walltime}: {others}"
    raise UserError(f"{key}.{found}. Add to the command: {key}.{mend}.{more if others else ''}")


def _rows(f: FacilityConfig) -> list[QueueConfig]:
    return [q for q in f.queues if (q.partition, q.qos) == (f.partition, f.qos)]


def _gives(queue: QueueConfig, walltime: str) -> bool:
    return queue.walltime is None or walltime_s(walltime) <= walltime_s(queue.walltime)


def _would_do(queue: QueueConfig, f: FacilityConfig) -> bool:
    there = replace(f, partition=queue.partition, qos=queue.qos)
    return queue_of(there) is queue and _gives(queue, f.walltime)


def _choose(key: str, f: FacilityConfig, queue: QueueConfig) -> str:
    wanted = {n: getattr(queue, n) for n in QUEUE if getattr(queue, n) != getattr(f, n)}
    return " ".join(f"{key}.{n}={value or 'null'}" for n, value in wanted.items())
