"""Other users' jobs, by a seeded schedule."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

from .cluster import Cluster
from .host import LabError

__all__ = ["Job", "Traffic", "schedule"]


@dataclass(frozen=True)
class Job:
    """A job that only holds its nodes; times in seconds from the begin of the schedule."""

    at_s: float
    nodes: int
    run_s: float


def schedule(
    seed: int, for_s: float, nodes: int, load: float, mean_run_s: float = 10.0
) -> list[Job]:
    """Return jobs of 1 to `nodes` nodes that ask for `load` times what the cluster has.

    Arrivals are a Poisson process, run times are exponential (Feitelson's simplest workload).
    """
    draw = random.Random(seed)
    mean_work_s = (nodes + 1) / 2 * mean_run_s
    jobs, now = [], 0.0
    while now < for_s:
        run_s = min(5 * mean_run_s, max(1.0, draw.expovariate(1 / mean_run_s)))
        jobs.append(Job(now, draw.randint(1, nodes), run_s))
        now += draw.expovariate(load * nodes / mean_work_s)
    return jobs


class Traffic:
    """Submits a schedule's jobs at their times, in a thread, until left."""

    def __init__(self, cluster: Cluster, jobs: list[Job], partition: str = "main") -> None:
        self.cluster, self.jobs, self.partition = cluster, jobs, partition
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._play, daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _play(self) -> None:
        began = time.monotonic()
        for job in self.jobs:
            if self._over.wait(max(0.0, began + job.at_s - time.monotonic())):
                return
            try:
                self.cluster.occupy(job.run_s, job.nodes, self.partition)
            except LabError:  # slurmctld is away, on purpose perhaps: a user would give up
                continue
