"""How long an optimizer step of a plan takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from flwr_hpc.plan.axonn import Grid, Volumes, layer_volumes
from flwr_hpc.plan.machine import Machine
from flwr_hpc.plan.parallel import FULL, NONE, SELECTIVE, ParallelPlan
from flwr_hpc.plan.shape import ModelShape, Projection

OPTIMIZER_BYTES = 40  # Per parameter: clipping and AdamW read and write float32 arrays ten times


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step: communication is what is left of it after overlap."""

    compute: float
    tensor: float  # All-reduces within layers; nothing hides them
    shard: float  # Gathering and scattering shards
    replicate: float  # Summing gradients over replicas
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, f.name) for f in fields(self)))


def step_time(shape: ModelShape, plan: ParallelPlan, seq_len: int, machine: Machine) -> StepTime:
    """Predict a step's time.

    Per micro batch the all-gathers and reduce-scatters of shards hide behind the computing of
    neighbouring layers; the all-reduce over replicas, once a step, behind the last backward pass.
    """
    compute = _compute(shape, plan, seq_len, machine)
    tensor, shard, replicate = _communication(shape, plan, seq_len, machine)
    hidden = machine.overlap * compute
    own = shape.trained / (plan.shard * plan.tensor)
    return StepTime(
        compute=plan.accumulation * compute,
        tensor=plan.accumulation * tensor,
        shard=plan.accumulation * max(0.0, shard - hidden),
        replicate=max(0.0, replicate - hidden * 2 / 3),
        optimizer=own * OPTIMIZER_BYTES / (machine.memory_gb_s * 1e9) + machine.step_overhead_s,
    )


def _compute(shape: ModelShape, plan: ParallelPlan, seq_len: int, machine: Machine) -> float:
    """Seconds of a micro batch: forward once, backward twice, what is recomputed once more."""
    lengths = shape.lengths(seq_len)
    again = {NONE: 0.0, SELECTIVE: 0.0, FULL: 1.0}[plan.checkpointing]
    rate = machine.peak_flops * machine.efficiency
    passes = 2 if shape.adapter_rank else 3  # forward, gradients of inputs, and of weights
    seconds = 0.0
    for block in shape.blocks:
        products = 0.0
        for p in block.projections:
            products += 2.0 * lengths.of(block, p) * p.active * p.weights * (passes + again)
            # What is frozen has no gradient, what is added has.
            added = p.copies * p.adapter(shape.adapter_rank)
            products += 2.0 * lengths.of(block, p) * added * (3 + again)
        attention = block.attention_flops(lengths) * (3 + again)
        flops = plan.micro_batch * (products + attention) / plan.tensor
        seconds += block.count * max(flops / rate, machine.layer_overhead_s * (3 + again) / 3)
    tokens = plan.micro_batch * lengths.target
    chunked = tokens * shape.vocabulary * 4 > 2**28  # then the head runs once more
    head = 2 * tokens * shape.vocabulary * shape.hidden * (passes + chunked) / plan.tensor
    return seconds + head / rate


def _communication(
    shape: ModelShape, plan: ParallelPlan, seq_len: int, machine: Machine
) -> tuple[float, float, float]:
    """Seconds of a micro batch's tensor and shard collectives, and of a step's over replicas."""
    grid = Grid(rows=plan.tensor, depth=plan.shard, data=plan.replicate)
    lengths = shape.lengths(seq_len)

    def volumes(projection: Projection, length: int, grid: Grid, packed: bool = False) -> Volumes:
        added = projection.adapter(shape.adapter_rank) / projection.weights
        trained = added if shape.adapter_rank else 1.0
        gathered = added + (not packed)
        return layer_volumes(
            projection.inputs, projection.outputs, plan.copies * plan.micro_batch * length, grid,
            transposed=projection.reduces, recomputed=plan.checkpointing == FULL,
            activation_bytes=machine.compute_bytes, gather_bytes=gathered * machine.compute_bytes,
            scatter_bytes=4 * trained, gradient_bytes=4 * trained,
        )  # fmt: skip

    # Each tensor rank runs the whole head on a share of the positions: it is sharded over them,
    # too, and what it sends is the gradient of these positions to the others.
    own = plan.tensor * plan.shard
    spread = Grid(depth=own, data=plan.replicate)
    head = volumes(Projection(shape.hidden, shape.vocabulary), lengths.target, spread)
    positions = plan.micro_batch * lengths.target * (1 - 1 / plan.tensor)
    rows, data, depth = positions * shape.hidden * machine.compute_bytes, head.data, 0.0
    for block in shape.blocks:
        for projection in block.projections:
            sent = volumes(projection, lengths.of(block, projection), grid, shape.packed)
            rows += block.count * projection.active * sent.rows
            depth += block.count * projection.copies * sent.depth
            data += block.count * projection.copies * sent.data
    layers, table = shape.layers, machine.bandwidths
    return (
        table.seconds(1, plan.tensor, rows / 1e9, collectives=4 * layers + 1),
        table.seconds(plan.tensor, plan.shard, depth / 1e9, collectives=3 * layers)
        + table.seconds(1, own, head.depth / 1e9, collectives=3),
        table.seconds(own, plan.replicate, data / 1e9, collectives=layers + 1),
    )
