"""How many points of a sweep have room in one job of a facility, and what each is given of it.

A job of a facility has `nodes` nodes of `ranks_per_node` ranks, each with its share of the node's
GPUs and CPUs. A point that takes some ranks of a node leaves room for others on it, and is a run of
its own there, at a facility without a batch system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.config.schema import Config, LimitsConfig
from flwr_hpc.errors import UserError


@dataclass(frozen=True)
class Room:
    """A job for points to share."""

    name: str  # Of the facility
    job: FacilityConfig  # As the job asks for it: one process per node, which has all of the node
    limits: LimitsConfig
    per_node: int  # Points at a time
    ranks: int  # Of a point
    gpus: int  # Likewise
    changes: tuple[str, ...]  # Overrides by which a point's run trains on its part of a node

    @property
    def node_hours(self) -> float:
        """Return what a job may take."""
        return self.job.nodes * walltime_s(self.job.walltime) / 3600

    def __str__(self) -> str:
        points = self.job.nodes * self.per_node
        nodes = "1 node" if self.job.nodes == 1 else f"{self.job.nodes} nodes"
        return (
            f"points share jobs of {self.name}: {points} at a time on {nodes}, "
            f"{self.ranks} of a node's ranks each; at most {self.node_hours:.2f} node-hours a job"
        )


def room_for(configs: Sequence[Config], ranks: int) -> Room:
    """Return the job that points of `ranks` ranks share.

    Parameters
    ----------
    configs : sequence of Config
        Every point's.
    ranks : int
        ``sweep.ranks_per_point``.
    """
    name, facility = _one_facility(configs)
    key, per_node = f"facilities.{name}", facility.ranks_per_node // ranks
    if not per_node:
        raise UserError(
            f"sweep.ranks_per_point={ranks}: a job of {name} has {facility.ranks_per_node} ranks "
            f"on a node ({key}.ranks_per_node). Give at most that, or leave sweep.ranks_per_point "
            "out: a point has jobs of its own then"
        )
    gpus = ranks * (facility.gpus_per_node // facility.ranks_per_node)
    alone = {"scheduler": "local", "nodes": 1, "ranks_per_node": ranks, "gpus_per_node": gpus}
    # What the job has seen to, or speaks of the batch system.
    settled = {"python": "null", "container": "null", "setup": [], "queues": [], "required": []}
    changes = [f"{key}.{field}={value}" for field, value in (alone | settled).items()]
    cpus = facility.ranks_per_node * facility.cpus_per_rank
    return Room(
        name=name,
        job=replace(facility, ranks_per_node=1, cpus_per_rank=cpus),
        limits=configs[0].site.limits,
        per_node=per_node,
        ranks=ranks,
        gpus=gpus,
        # The jobs' node-hours are counted where they are submitted.
        changes=(*changes, "site.limits.node_hours=null"),
    )


def _one_facility(configs: Sequence[Config]) -> tuple[str, FacilityConfig]:
    """Return the facility that all points have, and as the same."""
    instead = "Leave sweep.ranks_per_point out: a point has jobs of its own then"
    here = configs[0].facilities
    if any(config.facilities != here for config in configs):
        raise UserError(
            f"points share a job of one shape, but their facilities differ. {instead}; or give "
            "facilities.* one value each"
        )
    if len(here) != 1:
        raise UserError(
            f"points share a job where they train at one facility, here at {len(here)} "
            f"({', '.join(here)}). {instead}"
        )
    ((name, facility),) = here.items()
    if facility.local:
        raise UserError(
            f"{name} is this machine, which has no jobs to share. For several points at a time "
            "give sweep.parallel in place of sweep.ranks_per_point"
        )
    if facility.ssh:
        raise UserError(f"jobs at a host reached by ssh ({name}) are not shared. {instead}")
    return name, facility
