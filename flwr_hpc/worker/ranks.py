"""Which of the allocation's processes this one is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import submitit


@dataclass(frozen=True)
class Ranks:
    """The place of one process in its allocation."""

    rank: int = 0  # Over all nodes
    world_size: int = 1
    local_rank: int = 0  # On this node
    local_world_size: int = 1
    nodes: int = 1
    attempt: str = "0"  # Names this start of the job: differs when a scheduler requeues it

    @classmethod
    def detect(cls) -> Ranks:
        """Ask submitit, else the variables torchrun sets (``RANK``, ``WORLD_SIZE``, ...)."""
        try:
            job = submitit.JobEnvironment()
        except RuntimeError:
            return cls._from_environment()
        nodes = max(1, job.num_nodes)
        start = os.environ.get("FLWR_HPC_ATTEMPT") or os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            rank=job.global_rank,
            world_size=job.num_tasks,
            local_rank=job.local_rank,
            local_world_size=max(1, job.num_tasks // nodes),
            nodes=nodes,
            attempt=f"{job.job_id}-{start}",
        )

    @classmethod
    def _from_environment(cls) -> Ranks:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", rank)),
            local_world_size=local_world_size,
            nodes=max(1, world_size // local_world_size),
            attempt=os.environ.get("FLWR_HPC_ATTEMPT", "0"),
        )

    def cpu_threads(self) -> int:
        """Return the threads this rank may use: ``OMP_NUM_THREADS``, else its fair share."""
        if given := os.environ.get("OMP_NUM_THREADS"):
            return max(1, int(given))
        if hasattr(os, "sched_getaffinity"):  # what the scheduler gave us, not the whole node
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count() or 1
        return max(1, cores // self.local_world_size)
