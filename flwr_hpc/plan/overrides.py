"""The winner as settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flwr_hpc.config.facility import FacilityConfig, queue_of, walltime_s
from flwr_hpc.plan.parallel import ParallelPlan


def plan_overrides(
    name: str, f: FacilityConfig, nodes: int, plan: ParallelPlan, seq_len: int
) -> list[str]:
    """Return what a run needs to follow a plan that the trainer can execute."""
    return [
        *_allocation(name, f, nodes),
        f"data.seq_len={seq_len}",
        *(f"train.{name}={value}" for name, value in training_settings(plan).items()),
    ]


def training_settings(plan: ParallelPlan) -> Mapping[str, int | str]:
    """Return the fields of ``train`` by which the trainer follows a plan."""
    return {
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "activation_checkpointing": plan.checkpointing,
        "replicate": plan.replicate,
    }


def _allocation(name: str, f: FacilityConfig, nodes: int) -> list[str]:
    """The node count, and a queue that takes so many where the facility's default does not."""
    key = f"facilities.{name}"
    given = [f"{key}.nodes={nodes}"] if nodes != f.nodes else []
    wanted = replace(f, nodes=nodes)
    if queue_of(wanted) is not None or not f.queues:
        return given
    for queue in f.queues:
        there = replace(wanted, partition=queue.partition, qos=queue.qos)
        limit = queue.walltime
        if queue_of(there) is queue and (not limit or walltime_s(f.walltime) <= walltime_s(limit)):
            changed = [n for n in ("partition", "qos") if getattr(queue, n) != getattr(f, n)]
            return [*given, *(f"{key}.{n}={getattr(queue, n) or 'null'}" for n in changed)]
    return given
