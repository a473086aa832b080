"""What collectives reach between the devices of a facility, by group size and placement."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr_hpc.config.facility import FacilityConfig

ACHIEVED = 0.8  # Of the hardware's bandwidth, by a ring of large messages


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


def bandwidths(f: FacilityConfig) -> tuple[Bandwidths, list[str]]:
    """Return a facility's bandwidths, and what had to be assumed for want of facts."""
    link, network, assumed = f.gpu_link_gb_s, f.network_gb_s, []
    if link is None:
        link = 25.0 if f.gpus_per_node else 5.0
        if f.ranks_per_node > 1:
            assumed.append(f"gpu_link_gb_s={link:g} (PCIe 4)" if f.gpus_per_node else
                           f"gpu_link_gb_s={link:g} (shared memory)")  # fmt: skip
    if network is None:
        network = 25.0
        assumed.append(f"network_gb_s={network:g} (one HDR or NDR200 port)")
    table = {(row.inner, row.size): row.gb_s for row in f.bandwidths}
    return Bandwidths(f.ranks_per_node, link, network, f.gpu_switch, table), assumed
