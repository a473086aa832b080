"""A facility as data: one HPC centre's batch system, hardware and rules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from flwr_hpc.errors import UserError

__all__ = ["FacilityConfig", "PLACEMENT", "QUEUE", "QueueConfig", "queue_of", "rows", "walltime_s"]

QUEUE = ("partition", "qos")
PLACEMENT = ("account", *QUEUE, "constraint", "reservation")


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
        ``local`` (submitit's local executor), ``slurm`` or ``pbs``.
    account, partition, qos, constraint, reservation : str or None
        Passed to the scheduler when set; a batch system must be given `account`, if only as
        null. With PBS `partition` is the queue, and there are no others of these.
    nodes, ranks_per_node, gpus_per_node, cpus_per_rank : int
        Shape of one allocation; world size = nodes x ranks_per_node.
    gpu_request : str
        How GPUs are asked for with Slurm here: ``gres``, ``gpus``, ``gpus-per-node`` or
        ``gpus-per-task``.
    gpu_type : str or None
        Goes into the request where GPUs are asked for by type, as in ``gres=gpu:a100:4``.
    gpu_vendor : str
        ``nvidia``, ``amd`` or ``intel``: what a container is given to reach them.
    walltime : str
        ``HH:MM:SS`` or ``D-HH:MM:SS``.
    queues : list of QueueConfig
        What is known of partitions and QOS; a choice that is not among them is not checked.
    required : list of str
        Fields that must be given here besides `account`, e.g. ``qos``.
    forbidden : list of str
        sbatch options (PBS: resources) that jobs here must never set, e.g. ``mem``.
    workdir : str or None
        Folder on the facility's shared file system; default: in the run directory.
    shared_roots : list of str
        Where file systems are mounted that login and compute nodes share, ``$NAME`` as in a
        login node's shell; empty: not known.
    python : str or None
        Interpreter on the compute nodes; default: the one that runs this.
    setup : list of str
        Shell lines before the worker starts: modules, virtual environment.
    env : dict of str to str
        Environment of the job, e.g. ``NCCL_SOCKET_IFNAME``.
    container : str or None
        Image the worker runs in, by ``container_runtime`` (apptainer, singularity).
    sbatch : dict of str to str
        Further options of sbatch, verbatim.
    srun_args : list of str
    chunk : str or None
        PBS: what each node of the job asks for, e.g. ``ncpus=32:ngpus=4:mpiprocs=4``, which is
        also made from the shape above if this is null; empty: whole nodes.
    qsub : dict of str to str
        PBS: further resources, ``-l KEY=VALUE``, e.g. ``filesystems``; ``place`` is ``scatter``.
    mpi : str
        PBS: whose mpiexec starts the ranks, ``mpich`` (also Intel MPI and HPE Cray) or
        ``openmpi``.
    mpiexec_args : list of str
    peak_tflops : float or None
        Peak dense bf16 TFLOP/s of one device, for MFU.
    gpu_memory_gb : float or None
        Memory of one device.
    network_gb_s : float or None
        Injection bandwidth of a node into the interconnect, in GB/s.
    cpus_per_node : int or None
        CPUs of a node that jobs may use, as the scheduler counts them.
    poll_s : float
        The scheduler is asked about this facility's jobs no more often than this.
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
    shared_roots: list[str] = field(default_factory=list)
    python: str | None = None
    setup: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    container: str | None = None
    container_runtime: str = "apptainer"
    sbatch: dict[str, str] = field(default_factory=dict)
    srun_args: list[str] = field(default_factory=list)
    chunk: str | None = None
    qsub: dict[str, str] = field(default_factory=dict)
    mpi: str = "mpich"
    mpiexec_args: list[str] = field(default_factory=list)
    peak_tflops: float | None = None
    gpu_memory_gb: float | None = None
    network_gb_s: float | None = None
    cpus_per_node: int | None = None
    poll_s: float = 60.0
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
    fits = (q for q in rows(f) if q.min_nodes <= f.nodes <= (q.max_nodes or f.nodes))
    return next(fits, None)


def rows(f: FacilityConfig) -> list[QueueConfig]:
    """Return what is known of the queue that the facility asks for."""
    return [q for q in f.queues if (q.partition, q.qos) == (f.partition, f.qos)]
