"""What collectives reach between the devices of a facility, by group size and placement."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import decode
from flwr_hpc.errors import UserError
from flwr_hpc.files import publish, read_json

ACHIEVED = 0.8  # Of the hardware's bandwidth, by a ring of large messages


@dataclass
class MeasuredRow:
    """What was measured of groups of `size` ranks that lie `inner` apart, all at work at once.

    In GB/s that pass through each member of a ring (nccl-tests' bus bandwidth), which is what
    AxoNN's volumes are divided by.
    """

    inner: int
    size: int
    all_gather: float
    reduce_scatter: float
    all_reduce: float

    @property
    def gb_s(self) -> float:
        """Of equal volumes by each of the three, as plans do not tell them apart."""
        return 3 / (1 / self.all_gather + 1 / self.reduce_scatter + 1 / self.all_reduce)


@dataclass
class MeasuredBandwidths:
    """A facility's table as ``python -m flwr_hpc.doctor --bandwidth`` found it."""

    facility: str
    date: str  # ISO 8601, UTC
    torch: str
    device: str  # And what its collectives are made by
    nodes: list[str]
    ranks_per_node: int
    gpus_per_node: int
    rows: list[MeasuredRow]

    @property
    def origin(self) -> str:
        """When and where it was measured."""
        where = ", ".join(self.nodes[:2]) + (
            f" and {len(self.nodes) - 2} more" * (len(self.nodes) > 2)
        )
        return f"on {self.date[:10]} on {where} ({self.device}, torch {self.torch})"

    def is_of(self, f: FacilityConfig) -> bool:
        """Whether ranks lie on nodes as the facility has them now: placements mean that."""
        return (self.ranks_per_node, self.gpus_per_node) == (f.ranks_per_node, f.gpus_per_node)


def measured_file(facility: str, env: Mapping[str, str] = os.environ) -> Path:
    """Return where a facility's measured table is kept, for all runs of this user."""
    base = env.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "flwr-hpc" / "bandwidth" / f"{facility}.json"


def keep(measured: MeasuredBandwidths) -> Path:
    """Keep a table, in place of the one before."""
    path = measured_file(measured.facility)
    try:
        publish(path, json.dumps(asdict(measured), indent=1))
    except OSError as exc:
        raise UserError(
            f"the bandwidths cannot be kept: {path}: {exc.strerror}. Name another place, here and "
            "for flwr_hpc.plan: export XDG_CONFIG_HOME=DIR"
        ) from None
    return path


def kept(facility: str) -> MeasuredBandwidths | None:
    """Return a facility's measured table, if there is one."""
    path = measured_file(facility)
    try:
        found = read_json(path)
    except (OSError, ValueError) as exc:
        raise UserError(f"{path} cannot be read: {exc}. {_again(facility)}") from None
    if found is None:
        return None
    try:
        return decode(MeasuredBandwidths, found, str(path))
    except UserError as exc:
        raise UserError(f"{exc} {_again(facility)}") from None


def placements(world: int) -> list[tuple[int, int]]:
    """Return (inner, size) of all groups that share `world` ranks evenly; neighbours first."""
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    return [(i, s) for i in divisors for s in divisors if s > 1 and world % (i * s) == 0]


def _again(facility: str) -> str:
    return f"Measure anew: python -m flwr_hpc.doctor --bandwidth +facility={facility}"


@dataclass(frozen=True)
class Bandwidths:
    """A facility's bandwidths for collectives.

    Ranks are numbered node by node. A group of `size` ranks lies `inner` ranks apart: `inner`
    other groups of its kind share its nodes.
    """

    per_node: int  # Devices of a node
    link_gb_s: float  # One direction, of one device to all others of its node
    network_gb_s: float  # Into a node
    switch: bool = False  # Any two devices of a node reach `link_gb_s`; else a share of it
    # Measured, in GB/s by (inner, size); what is not in it follows from the numbers above.
    measured: dict[tuple[int, int], float] = field(default_factory=dict)
    latency_s: float = 2e-5  # Of one collective

    def gb_s(self, inner: int, size: int) -> float:
        """Return the bandwidth of a ring through a group, as every member sees it (AxoNN)."""
        if found := self._measured(inner, size):
            return found
        if inner * size <= self.per_node:
            peers = 1.0 if self.switch else (size - 1) / max(1, self.per_node - 1)
            return ACHIEVED * self.link_gb_s * peers
        # A ring that leaves the node shares its network with those beside it.
        return ACHIEVED * self.network_gb_s / min(inner, self.per_node)

    def _measured(self, inner: int, size: int) -> float | None:
        """Return the measured value of the group, or of the next smaller one across nodes."""
        if (inner, size) in self.measured or inner * size <= self.per_node:
            return self.measured.get((inner, size))
        inner = min(inner, self.per_node)  # further apart than a node is no further
        sizes = [s for i, s in self.measured if i == inner and self.per_node < i * s]
        near = [s for s in sizes if s <= size]
        return self.measured[inner, max(near)] if near else None

    def seconds(self, inner: int, size: int, gigabytes: float, collectives: int = 1) -> float:
        """Return how long collectives of so many GB, through each member, take together."""
        if size <= 1:
            return 0.0
        return gigabytes / self.gb_s(inner, size) + collectives * self.latency_s


def bandwidths(
    f: FacilityConfig, measured: MeasuredBandwidths | None = None
) -> tuple[Bandwidths, list[str]]:
    """Return a facility's bandwidths, and what had to be assumed for want of facts.

    Parameters
    ----------
    f : FacilityConfig
    measured : MeasuredBandwidths or None
        Comes before what the facility's file says of the same groups.
    """
    table = {(row.inner, row.size): row.gb_s for row in f.bandwidths}
    table |= {(row.inner, row.size): row.gb_s for row in measured.rows} if measured else {}
    link, network, assumed = f.gpu_link_gb_s, f.network_gb_s, []
    if link is None:
        link = 25.0 if f.gpus_per_node else 5.0
        if any(group not in table for group in placements(f.ranks_per_node)):
            assumed.append(f"gpu_link_gb_s={link:g} (PCIe 4)" if f.gpus_per_node else
                           f"gpu_link_gb_s={link:g} (shared memory)")  # fmt: skip
    if network is None:
        network = 25.0
        if all(inner * size <= f.ranks_per_node for inner, size in table):
            assumed.append(f"network_gb_s={network:g} (one HDR or NDR200 port)")
    return Bandwidths(f.ranks_per_node, link, network, f.gpu_switch, table), assumed
