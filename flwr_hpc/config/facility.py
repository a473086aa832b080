"""A facility as data: one HPC centre's batch system, hardware and rules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from flwr_hpc.errors import UserError

LOCAL = "local"  # The scheduler that is no batch system
AUTO = "auto"  # The account that is not given: the user's own, see `schedulers.accounts`
QUEUE = ("partition", "qos")
PLACEMENT = ("account", *QUEUE, "constraint", "reservation")


@dataclass
class QueueConfig:
    """A way into a facility: what a partition and QOS let a job of some node count have."""

    partition: str | None = None  # The row speaks of jobs that ask for exactly these
    qos: str | None = None
    # Node counts it speaks of; of several rows the first that fits holds, so that a walltime
    # limit can be a function of the node count.
    min_nodes: int = 1
    max_nodes: int | None = None
    walltime: str | None = None  # The longest that may be asked for (None: not known)
    # Jobs may be put back in the queue to make room; they are submitted with ``--requeue``.
    preemptable: bool = False


@dataclass
class BandwidthConfig:
    """What collectives reach at a facility, as measured there."""

    # A group of `size` ranks that lie `inner` apart: 1 for neighbours.
    inner: int = 1
    size: int = 2
    gb_s: float = 0.0  # Through each member of the group (nccl-tests' bus bandwidth)


@dataclass
class FacilityConfig:
    """One HPC centre as data: how to get an allocation there and what it is made of."""

    # Its batch system: ``slurm``, ``pbs``, ``local`` (none: jobs run on this host) or one of
    # your own.
    scheduler: str = "slurm"
    # What jobs are charged to; ``auto``: your own, of the environment (``SBATCH_ACCOUNT``) or the
    # only one that the batch system shows; null: none, where the cluster keeps none.
    account: str | None = AUTO
    # Passed to the scheduler when set. With PBS `partition` is the queue, and there are no
    # others of these.
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    nodes: int = 1  # Shape of one allocation; world size = nodes x ranks_per_node
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int = 1
    # How GPUs are asked for with Slurm here: ``gres``, ``gpus``, ``gpus-per-node`` or
    # ``gpus-per-task``.
    gpu_request: str = "gres"
    # Goes into the request where GPUs are asked for by type, as in ``gres=gpu:a100:4``.
    gpu_type: str | None = None
    # ``nvidia``, ``amd`` or ``intel``: what a container is given to reach them.
    gpu_vendor: str = "nvidia"
    walltime: str = "01:00:00"  # ``HH:MM:SS`` or ``D-HH:MM:SS``
    # What is known of partitions and QOS; a choice that is not among them is not checked.
    queues: list[QueueConfig] = field(default_factory=list)
    # Fields that must be given here, e.g. ``qos``.
    required: list[str] = field(default_factory=list)
    # Options (PBS: also resources of a chunk) that jobs here must never set, e.g. ``mem``.
    forbidden: list[str] = field(default_factory=list)
    # Folder on the facility's shared file system; default: in the run directory.
    workdir: str | None = None
    # Where file systems are mounted that login and compute nodes share, ``$NAME`` as in a
    # login node's shell; empty: not known.
    shared_roots: list[str] = field(default_factory=list)
    python: str | None = None  # Interpreter on the compute nodes; default: the one that runs this
    # A host of your ``~/.ssh/config`` where the site is started; default: this machine.
    ssh: str | None = None
    ssh_python: str | None = None  # Interpreter on that host; default: `python`
    # Install this flwr-hpc for that interpreter where it has another or none (`pip install`).
    ssh_install: bool = False
    # Further settings of the site there, as `python -m flwr_hpc.join` takes them, e.g.
    # ``model.path=/scratch/model``.
    join: list[str] = field(default_factory=list)
    # Shell lines before the worker starts: modules, virtual environment.
    setup: list[str] = field(default_factory=list)
    # Environment of the job, e.g. ``NCCL_SOCKET_IFNAME``.
    env: dict[str, str] = field(default_factory=dict)
    # Image the worker runs in, by ``container_runtime`` (apptainer, singularity).
    container: str | None = None
    container_runtime: str = "apptainer"
    # Further options of the job script, verbatim: of sbatch without their dashes, ``""`` where
    # there is no value; of PBS resources, ``-l KEY=VALUE`` (``place`` is ``scatter``).
    options: dict[str, str] = field(default_factory=dict)
    # Of what starts the ranks: srun, mpiexec.
    launcher_args: list[str] = field(default_factory=list)
    # PBS: what each node of the job asks for, e.g. ``ncpus=32:ngpus=4:mpiprocs=4``, which is
    # also made from the shape above if this is null; empty: whole nodes.
    chunk: str | None = None
    # PBS: whose mpiexec starts the ranks, ``mpich`` (also Intel MPI and HPE Cray), ``openmpi``,
    # or ``mpich-tmrsh``: an MPICH that knows nothing of PBS, over pbs_tmrsh.
    mpi: str = "mpich"
    peak_tflops: float | None = None  # Peak dense bf16 TFLOP/s of one device, for MFU
    gpu_memory_gb: float | None = None  # Memory of one device
    gpu_power_w: float | None = None  # Rated power of one device, for energy
    # One direction, of one device to all others of its node together, in GB/s.
    gpu_link_gb_s: float | None = None
    # A switch joins the devices of a node: any two of them reach `gpu_link_gb_s`.
    gpu_switch: bool = False
    # Bandwidths of collectives where they were measured, for plans.
    bandwidths: list[BandwidthConfig] = field(default_factory=list)
    # Injection bandwidth of a node into the interconnect, in GB/s.
    network_gb_s: float | None = None
    # CPUs of a node that jobs may use, as the scheduler counts them.
    cpus_per_node: int | None = None
    # Rank of the adapters here, at most ``model.lora.r`` (null); see ``strategy=flora``.
    lora_r: int | None = None
    # The scheduler is asked about this facility's jobs no more often than this.
    poll_s: float = 60.0
    # Whether compute nodes reach outside (else Hugging Face is put in offline mode).
    internet: bool = False

    @property
    def local(self) -> bool:
        """Whether jobs run on this host, at once."""
        return self.scheduler == LOCAL


def walltime_s(text: str) -> int:
    """Return the seconds of a walltime: ``MM``, ``MM:SS``, ``HH:MM:SS``, ``D-HH[:MM[:SS]]``."""
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
