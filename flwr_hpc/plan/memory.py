"""What a plan needs of a device's memory, part by part."""

from __future__ import annotations

from dataclasses import dataclass, fields

from flwr_hpc.plan.parallel import FULL, NONE, ParallelPlan
from flwr_hpc.plan.shape import Block, Lengths, ModelShape

ONE_UNIT_BELOW = 30_000_000  # Smaller models are gathered whole, see `parallel.sharding`
# Of a weight in nf4 with its scales: one byte for 64 of them, whose own are four for 256 bytes.
PACKED_BYTES = 1 / 2 + 1 / 64 + 4 / 64 / 256
CHUNK_BYTES = 2**28  # Of float32 logits that exist at a time, see `flwr_hpc.train.loss`


@dataclass(frozen=True)
class Memory:
    """Bytes per device at the peak of a step."""

    parameters: float  # This rank's shard, float32; what is packed, whole
    gradients: float  # Of the shard's that are trained
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


def memory(
    shape: ModelShape,
    plan: ParallelPlan,
    seq_len: int,
    compute_bytes: int,
    gloo: bool = False,
    offloaded: bool = False,
) -> Memory:
    """Predict a plan's memory: that of the fullest moment of a step.

    Parameters
    ----------
    shape : ModelShape
    plan : ParallelPlan
    seq_len : int
    compute_bytes : int
        Of a number in the precision of computing: 2 (bf16) or 4 (fp32).
    gloo : bool
        Ranks talk through gloo (CPUs), whose collectives work on copies.
    offloaded : bool
        Parameters, gradients and moments lie in the host's memory.
    """
    if shape.adapter_rank:
        return _below_adapters(shape, plan, seq_len, compute_bytes, offloaded)
    step = _Step(shape, plan, shape.lengths(seq_len), compute_bytes, gloo, offloaded)
    moments = [step.turning(), step.end()]
    if step.prefetches:
        moments.append(step.backward())
    return max(moments, key=lambda m: m.total)


@dataclass(frozen=True)
class _Step:
    """The moments of a step at which most is held."""

    shape: ModelShape
    plan: ParallelPlan
    lengths: Lengths
    size: int  # Of a number, in bytes
    gloo: bool
    offloaded: bool

    @property
    def prefetches(self) -> bool:
        """Whether the next layer is gathered while one works."""
        return self._layerwise and self.plan.shard > 1

    def turning(self) -> Memory:
        """Between forward and backward pass: all activations but, at first, no gradients."""
        kept, recomputed = _activations(self.shape, self.plan, self.lengths, self.size)
        logits = _logits(self.shape, self.plan, self.lengths, self.size)
        # What is recomputed comes after the head's backward pass.
        activations = kept + max(0.0, recomputed - logits)
        # The last gathering's array stays beside the parameters that were copied out of it.
        gathered = self._unit * (2 if self._layerwise or self.plan.shard > 1 else 1)
        buffers = 0.0 if self._plain else (gathered + self._outside) * self.size
        return self._with(self._earlier, activations, logits, buffers)

    def backward(self) -> Memory:
        """When the last layer's gradients are reduced, the next works and one more is gathered."""
        kept, _ = _activations(self.shape, self.plan, self.lengths, self.size)
        gathered = (2 + self.gloo) * self._unit + 2 * self._outside
        reduced = 4 * self._unit * (1 + 1 / self.plan.shard)
        activations = kept * (1 - 1 / self.shape.layers)
        return self._with(self._earlier, activations, 0.0, gathered * self.size + reduced)

    def end(self) -> Memory:
        """In the first layer's backward pass, or when the last gradients are reduced."""
        layer = self.plan.micro_batch * max(
            saved_bytes(block, self.plan, self.lengths, self.size) for block in self.shape.blocks
        )
        # A tied table's gradient comes twice, and is added up.
        table = self.size * self.shape.vocabulary * self.shape.hidden * self.shape.tied
        if self._plain:
            return self._with(self._own, 0.0, 0.0, max(layer, table))
        working = 2 * self.size * self._unit  # gathered parameters, and gradients
        if self._layerwise:  # the gradients reduced before are let go of after these
            works = max(working + layer, self._reducing(self._unit)) + 2 * self.size * self._outside
            buffers = max(works, self._reducing(self._outside)) + 4 * self._unit
            whole = self._unit + self._outside / self.plan.tensor
            made = max(0.0, self._own - 4 * whole / self.plan.shard)
            return self._with(self._earlier or made, 0.0, 0.0, buffers)
        reducing = self._reducing(self._unit)
        reducing += 4 * self._unit / self.plan.shard if self.plan.shard > 1 else 0.0
        buffers = max(working + max(layer, 2 * table / self.plan.tensor), reducing)
        return self._with(self._earlier, 0.0, 0.0, buffers)

    def _reducing(self, parameters: float) -> float:
        """Gradients in float32, beside those they were copied from, or gloo's copy."""
        copied = self.gloo and self.plan.shard * self.plan.replicate > 1
        return parameters * (4 + max(self.size, 4 * copied))

    def _with(self, gradients: float, activations: float, logits: float, buffers: float) -> Memory:
        # Of two layers the shards that come from the host, and of one the gradients that go there.
        passing = 3 * 4 * self._unit / self.plan.shard if self.offloaded else 0.0
        return Memory(self._own, gradients, 2 * self._own, activations, logits, buffers + passing)

    @property
    def _own(self) -> float:
        """Bytes of this rank's parameters, in float32, on the device."""
        if self.offloaded:
            return 0.0
        return 4 * self.shape.parameters / (self.plan.shard * self.plan.tensor)

    @property
    def _earlier(self) -> float:
        """Gradients of earlier micro batches."""
        return self._own if self.plan.accumulation > 1 else 0.0

    @property
    def _plain(self) -> bool:
        return _plain(self.plan, self.size, self.offloaded)

    @property
    def _layerwise(self) -> bool:
        return self.shape.parameters >= ONE_UNIT_BELOW or self.plan.tensor > 1

    @property
    def _unit(self) -> float:
        """Parameters that are gathered together: a layer's, or all."""
        largest = max(block.parameters for block in self.shape.blocks)
        return (largest if self._layerwise else self.shape.parameters) / self.plan.tensor

    @property
    def _outside(self) -> float:
        """Parameters of the unit that is gathered all the time, whole on every tensor rank."""
        return float(self.shape.outside) if self._layerwise else 0.0


def _plain(plan: ParallelPlan, compute_bytes: int, offloaded: bool) -> bool:
    """Whether nothing is sharded, gathered or cast, see `parallel.sharding`."""
    return plan.copies * plan.tensor == 1 and compute_bytes == 4 and not offloaded


def saved_bytes(block: Block, plan: ParallelPlan, lengths: Lengths, compute_bytes: int) -> float:
    """Return what a layer keeps of a sequence for the backward pass, nothing recomputed."""
    tokens, away = lengths.of(block), 1 - 1 / plan.tensor
    kept = tokens * (block.saved - block.saved_split * away)
    kept += lengths.source * block.saved_source / plan.tensor
    pairs = block.saved_pairs * lengths.pairs(block) / plan.tensor
    return kept * compute_bytes + tokens * (block.saved_float32 * 4 + pairs)


def _activations(
    shape: ModelShape, plan: ParallelPlan, lengths: Lengths, compute_bytes: int
) -> tuple[float, float]:
    """Of a micro batch: what is kept of all layers, and of one that is recomputed."""
    whole = [(b.count, saved_bytes(b, plan, lengths, compute_bytes)) for b in shape.blocks]
    if plan.checkpointing == NONE:
        return plan.micro_batch * sum(count * saved for count, saved in whole), 0.0
    recomputed = plan.micro_batch * max(saved for _, saved in whole)
    away, elements = 1 - 1 / plan.tensor, 0.0
    for block in shape.blocks:
        if plan.checkpointing == FULL:
            kept = float(lengths.of(block) * shape.hidden)
        else:
            kept = lengths.of(block) * (block.selective - block.selective_split * away)
            kept += lengths.source * block.saved_source / plan.tensor
        elements += block.count * kept
    return plan.micro_batch * elements * compute_bytes, recomputed


def _logits(shape: ModelShape, plan: ParallelPlan, lengths: Lengths, compute_bytes: int) -> float:
    """A chunk's logits, their float32 copy, its log-softmax, and the gradients of both."""
    tokens = plan.micro_batch * lengths.target
    elements = min(tokens * shape.vocabulary, CHUNK_BYTES / 4) / plan.tensor
    return elements * (2 * compute_bytes + 8)


def _below_adapters(
    shape: ModelShape, plan: ParallelPlan, seq_len: int, compute_bytes: int, offloaded: bool
) -> Memory:
    """Between forward and backward pass, with the adapters' gradients: frozen weights have none.

    Packed matrices are on every rank; one at a time is unpacked.
    """
    of_shard, lengths = 4 / (plan.shard * plan.tensor), shape.lengths(seq_len)
    trained = of_shard * shape.adapters
    packed = shape.matrices if shape.packed else 0
    parameters = of_shard * (shape.parameters - packed) + PACKED_BYTES * packed + trained
    kept, recomputed = _activations(shape, plan, lengths, compute_bytes)
    logits = _logits(shape, plan, lengths, compute_bytes)
    activations = kept + max(0.0, recomputed - logits)
    layer = max(b.adapters(shape.adapter_rank) for b in shape.blocks)
    if not shape.packed:
        layer += max(b.parameters for b in shape.blocks)
    unpacked = max(p.weights for b in shape.blocks for p in b.projections) if packed else 0
    whole = (
        0.0 if _plain(plan, compute_bytes, offloaded) else 2 * layer / plan.tensor + shape.outside
    )
    gathered = (whole + unpacked) * compute_bytes
    if offloaded:  # and pass in two layers' shards
        return Memory(0.0, 0.0, 0.0, activations, logits, gathered + 2 * of_shard * layer)
    return Memory(parameters, trained, 2 * trained, activations, logits, gathered)
