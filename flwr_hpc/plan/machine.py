"""A facility's hardware in the numbers of the performance model, and what had to be assumed."""

from __future__ import annotations

from dataclasses import dataclass

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.plan.bandwidth import Bandwidths, MeasuredBandwidths, bandwidths

# Of a GPU's memory, what the model does not count: context, communicators, fragments.
RESERVED_GB, RESERVED_SHARE = 1.5, 0.06


@dataclass(frozen=True)
class Machine:
    """What an allocation is made of. Every rank drives one device."""

    nodes: int
    per_node: int  # Ranks of a node
    peak_flops: float  # Of one device
    memory_bytes: float | None  # Of one device that a plan may fill (None: not known)
    power_w: float | None  # Of one device
    bandwidths: Bandwidths
    compute_bytes: int = 2  # Of a number in the precision of computing
    # Share of the peak that a layer's matrix products reach.
    efficiency: float = 0.5
    # Share of the computing time that can hide the communication of shards and replicas.
    overlap: float = 0.8
    layer_overhead_s: float = 6e-4  # At least so long takes a layer, forward and backward
    memory_gb_s: float = 1200.0  # What the optimizer's pass over its state reaches
    step_overhead_s: float = 0.005  # Of an optimizer step: data, votes, the loss
    gloo: bool = False  # Ranks talk through gloo: they have no GPUs
    offloaded: bool = False  # What is sharded lies in the hosts' memory

    @property
    def ranks(self) -> int:
        """Of the allocation."""
        return self.nodes * self.per_node


def machine(
    f: FacilityConfig,
    nodes: int,
    precision: str,
    efficiency: float,
    overlap: float,
    measured: MeasuredBandwidths | None = None,
    offloaded: bool = False,
) -> tuple[Machine, list[str]]:
    """Return a facility's machine, and the facts it lacks with what stands in for them."""
    gpus = f.gpus_per_node > 0
    table, assumed = bandwidths(f, measured)
    peak = f.peak_tflops
    if peak is None:
        peak = 312.0 if gpus else 0.1
        assumed.append(f"peak_tflops={peak:g} ({'an A100' if gpus else 'a few CPU cores'})")
    memory = None
    if f.gpu_memory_gb is not None:
        memory = (f.gpu_memory_gb * (1 - RESERVED_SHARE) - RESERVED_GB) * 1e9
    else:
        assumed.append("gpu_memory_gb: unknown, so nothing is rejected for memory")
    bf16 = precision == "bf16" or (precision == "auto" and gpus)
    made = Machine(
        nodes, f.ranks_per_node, peak * 1e12, memory, f.gpu_power_w, table,
        compute_bytes=2 if bf16 else 4, efficiency=efficiency, overlap=overlap,
        memory_gb_s=1200.0 if gpus and not offloaded else 10.0, gloo=not gpus,
        offloaded=offloaded,
    )  # fmt: skip
    return made, assumed
