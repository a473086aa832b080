"""What a plan needs of a device's memory, part by part."""

from __future__ import annotations

from dataclasses import dataclass, fields

from flwr_hpc.plan.parallel import FULL, NONE, ParallelPlan
from flwr_hpc.plan.shape import Block, ModelShape

ONE_UNIT_BELOW = 30_000_000  # Smaller models are gathered whole, see `flwr_hpc.train.parallel`
CHUNK_BYTES = 2**28  # Of float32 logits that exist at a time, see `flwr_hpc.train.loss`


@dataclass(frozen=True)
class Memory:
    """Bytes per device at the peak of a step."""

    parameters: float  # This rank's shard, float32
    gradients: float  # Likewise
    optimizer: float  # AdamW's two moments
    activations: float
    logits: float
    buffers: float  # Gathered layers and their gradients

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, f.name) for f in fields(self)))

    @property
    def largest(self) -> list[str]:
        """Names of the parts, largest first."""
        return sorted((f.name for f in fields(self)), key=lambda n: -getattr(self, n))


def memory(shape: ModelShape, plan: ParallelPlan, seq_len: int, compute_bytes: int) -> Memory:
    """Predict a plan's memory.

    It is the larger of two moments: between forward and backward pass, with all activations but,
    without accumulation, no gradients; and at the end, when the last gradients are reduced.

    Parameters
    ----------
    shape : ModelShape
    plan : ParallelPlan
    seq_len : int
    compute_bytes : int
        Of a number in the precision of computing: 2 (bf16) or 4 (fp32).
    """
    own = 4 * shape.parameters / (plan.shard * plan.tensor)
    tokens = plan.micro_batch * seq_len
    gathered, reduced = _buffers(shape, plan, compute_bytes)
    kept, recomputed = _activations(shape, plan, seq_len, compute_bytes)
    logits = _logits(shape, plan, tokens, compute_bytes)
    turning = Memory(
        parameters=own, optimizer=2 * own, gradients=own if plan.accumulation > 1 else 0.0,
        # What is recomputed comes after the head's backward pass.
        activations=tokens * kept + max(0.0, tokens * recomputed - logits), logits=logits,
        buffers=gathered,
    )  # fmt: skip
    end = Memory(own, own, 2 * own, 0.0, 0.0, reduced)
    return max(turning, end, key=lambda m: m.total)


def saved_bytes(block: Block, plan: ParallelPlan, seq_len: int, compute_bytes: int) -> float:
    """Return what a layer keeps per token for the backward pass, nothing recomputed."""
    split = block.saved_split * (1 - 1 / plan.tensor)
    pairs = block.saved_pairs * seq_len / plan.tensor
    return (block.saved - split) * compute_bytes + block.saved_float32 * 4 + pairs


def _activations(
    shape: ModelShape, plan: ParallelPlan, seq_len: int, compute_bytes: int
) -> tuple[float, float]:
    """Per token: what is kept of all layers, and of one that is recomputed."""
    whole = [(b.count, saved_bytes(b, plan, seq_len, compute_bytes)) for b in shape.blocks]
    if plan.checkpointing == NONE:
        return sum(count * saved for count, saved in whole), 0.0
    recomputed = max(saved for _, saved in whole)
    if plan.checkpointing == FULL:
        return shape.layers * shape.hidden * compute_bytes, recomputed
    away = 1 - 1 / plan.tensor
    kept = sum(b.count * (b.selective - b.selective_split * away) for b in shape.blocks)
    return kept * compute_bytes, recomputed


def _logits(shape: ModelShape, plan: ParallelPlan, tokens: float, compute_bytes: int) -> float:
    """A chunk's logits, their float32 copy, its log-softmax, and the gradients of both."""
    elements = min(tokens * shape.vocabulary, CHUNK_BYTES / 4) / plan.tensor
    return elements * (2 * compute_bytes + 8)


def _buffers(shape: ModelShape, plan: ParallelPlan, compute_bytes: int) -> tuple[float, float]:
    """Gathered parameters (this layer, the next, what lies outside); gradients being reduced.

    FSDP2 gathers into an array of its own also where one rank has all.
    """
    layer = max(b.parameters for b in shape.blocks) / plan.tensor
    outside = shape.outside / plan.tensor
    if shape.parameters < ONE_UNIT_BELOW:
        layer, outside = 0.0, shape.parameters / plan.tensor
    copies = 4 if plan.shard * plan.replicate > 1 or compute_bytes < 4 else 0
    gathered = (2 * layer + outside) * compute_bytes
    return gathered, max(layer, outside) * (compute_bytes + copies)
