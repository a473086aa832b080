"""All plans of an allocation: which fit, which are fast, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flwr_hpc.plan.machine import Machine
from flwr_hpc.plan.memory import Memory, memory
from flwr_hpc.plan.parallel import CHECKPOINTING, ParallelPlan
from flwr_hpc.plan.shape import ModelShape, tensor_degrees
from flwr_hpc.plan.step import StepTime, step_time


@dataclass(frozen=True)
class Candidate:
    """A plan with what is predicted of it."""

    plan: ParallelPlan
    memory: Memory
    time: StepTime
    tokens_per_s: float  # Of the allocation
    over_bytes: float  # What it needs above the device's memory; 0: it fits
    missing: str = ""  # What the trainer lacks to execute it

    @property
    def fits(self) -> bool:
        """Whether the device's memory is enough, as far as that is known."""
        return self.over_bytes <= 0

    @property
    def executable(self) -> bool:
        """Whether it fits, and today's trainer can execute it."""
        return self.fits and not self.missing

    @property
    def reason(self) -> str:
        """What the step's time goes to, or what is too large."""
        if not self.fits:
            first, second, *_ = self.memory.largest
            return (
                f"{self.over_bytes / 1e9:.1f} GB too much: {first} "
                f"{getattr(self.memory, first) / 1e9:.1f} GB, {second} "
                f"{getattr(self.memory, second) / 1e9:.1f} GB"
            )
        parts = {name: value for name, value in vars(self.time).items() if value > 0}
        shares = sorted(parts.items(), key=lambda part: -part[1])
        listed = [
            f"{n} {v / self.time.total:.0%}" for n, v in shares if v > 0.005 * self.time.total
        ]
        return ", ".join(listed)


def global_batch(batch_tokens: int, seq_len: int, ranks: int) -> int:
    """Return the sequences of a step nearest to `batch_tokens`: a power of two per rank."""
    per_rank = max(1.0, batch_tokens / seq_len / ranks)
    return int(ranks * 2 ** round(math.log2(per_rank)))


def candidates(
    shape: ModelShape, machine: Machine, sequences: int, seq_len: int
) -> list[Candidate]:
    """Return every plan, the best first; those that do not fit last, the least over first."""
    found = [_candidate(shape, machine, plan, seq_len) for plan in plans(shape, machine, sequences)]
    return sorted(found, key=lambda c: (c.over_bytes, -c.tokens_per_s, c.memory.total))


def plans(shape: ModelShape, machine: Machine, sequences: int) -> Iterator[ParallelPlan]:
    """Enumerate the plans of so many sequences per step.

    Tensor parallelism stays within a node: its all-reduces wait for nothing to hide them.
    """
    for tensor in tensor_degrees(shape, machine.per_node):
        if machine.per_node % tensor:
            continue
        copies = machine.ranks // tensor
        for shard in (d for d in range(1, copies + 1) if copies % d == 0):
            share, rest = divmod(sequences, copies)
            micro = 1
            while not rest and micro <= share:
                if share % micro == 0:
                    for kind in CHECKPOINTING:
                        yield ParallelPlan(
                            copies // shard, shard, tensor, micro, share // micro, kind
                        )
                micro *= 2


def best_of_each_kind(ranked: list[Candidate]) -> list[Candidate]:
    """Keep of every mesh and way of checkpointing the first."""
    kept: dict[tuple[str, str], Candidate] = {}
    for candidate in ranked:
        kept.setdefault((candidate.plan.mesh, candidate.plan.checkpointing), candidate)
    return list(kept.values())


def _candidate(shape: ModelShape, machine: Machine, plan: ParallelPlan, seq_len: int) -> Candidate:
    needed = memory(shape, plan, seq_len, machine.compute_bytes, machine.gloo, machine.offloaded)
    time = step_time(shape, plan, seq_len, machine)
    over = 0.0 if machine.memory_bytes is None else needed.total - machine.memory_bytes
    missing = "TP" if plan.tensor > 1 and not shape.splits else ""
    speed = plan.sequences * seq_len / time.total
    return Candidate(plan, needed, time, speed, max(0.0, over), missing)
