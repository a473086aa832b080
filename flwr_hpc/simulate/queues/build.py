"""From a site's configuration to the model of its queue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from flwr_hpc.config.facility import walltime_s
from flwr_hpc.errors import UserError
from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.config import QueueModel, SiteModel
from flwr_hpc.simulate.queues.cluster import BackfillCluster
from flwr_hpc.simulate.queues.models import (
    EmpiricalQueue,
    FirstWaitQueue,
    LognormalQueue,
    NoQueue,
    Queue,
    ReplayQueue,
)
from flwr_hpc.simulate.queues.trace import TraceQueue, similar_jobs
from flwr_hpc.site.forecast.history import History

WARMUP = 24.0  # mean runtimes of other users' jobs before the simulation begins


def build_queue(
    model: QueueModel, site: str, at: SiteModel, clock: VirtualClock, rng: np.random.Generator
) -> Queue:
    """Return a site's queue.

    Parameters
    ----------
    model : QueueModel
    site : str
        Its name; runs at a facility of that name have kept waits.
    at : SiteModel
        For the size and length of its jobs.
    clock : VirtualClock
    rng : numpy Generator
    """
    queue = _queue(model, site, at, clock, rng)
    return FirstWaitQueue(queue) if model.first_wait_only else queue


def _queue(
    model: QueueModel, site: str, at: SiteModel, clock: VirtualClock, rng: np.random.Generator
) -> Queue:
    if model.kind == "none":
        return NoQueue()
    if model.kind == "lognormal":
        return LognormalQueue(clock, _course(model), model.sigma, model.memory_s, rng)
    if model.kind == "replay":
        return ReplayQueue(clock, model.waits_s)
    if model.kind == "cluster":
        return BackfillCluster(
            clock,
            model.cluster_nodes,
            model.load,
            model.mean_nodes,
            model.mean_runtime_s,
            rng,
            warmup_s=WARMUP * model.mean_runtime_s,
        )
    if model.kind == "trace":
        wall_s = walltime_s(at.walltime) / model.time_scale
        jobs = similar_jobs(Path(str(model.trace)), at.nodes, wall_s)
        begin_s = float(rng.uniform(0.0, jobs[-1].submit_s - jobs[0].submit_s))
        return TraceQueue(clock, jobs, begin_s, model.time_scale)
    return EmpiricalQueue(clock, _history(site), rng)


def _course(model: QueueModel) -> Callable[[float], float]:
    """Return the median wait as a function of the time."""
    regimes = sorted((float(at), float(median)) for at, median in model.regimes)

    def median_s(now: float) -> float:
        past = [median for at, median in regimes if at <= now]
        return past[-1] if past else model.median_s

    return median_s


def _history(site: str) -> list[float]:
    """Return the waits that runs at a facility have kept."""
    waits = History(site).waits()
    known = [w.waited_s for w in waits if w.over and not w.void and w.waited_s is not None]
    if not known:
        raise UserError(
            f"no run has kept waits of facility '{site}' yet. Choose another queue, e.g. "
            "queue.kind=lognormal, or name the facility: '+facility=[NAME]'"
        )
    return known
