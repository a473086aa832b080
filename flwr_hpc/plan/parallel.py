"""A parallel plan: how ranks, batch and recomputation are arranged."""

from __future__ import annotations

from dataclasses import dataclass

NONE, SELECTIVE, FULL = "none", "selective", "full"
CHECKPOINTING = (NONE, SELECTIVE, FULL)


@dataclass(frozen=True)
class ParallelPlan:
    """Ranks = replicate x shard x tensor; tensor ranks are neighbours, replicas furthest apart."""

    replicate: int
    shard: int
    tensor: int
    micro_batch: int  # Sequences per model copy and forward pass
    accumulation: int
    checkpointing: str

    @property
    def copies(self) -> int:
        """Model copies, sharded or not, that work on different data."""
        return self.replicate * self.shard

    @property
    def sequences(self) -> int:
        """Of an optimizer step."""
        return self.copies * self.micro_batch * self.accumulation

    @property
    def mesh(self) -> str:
        """Replicate x shard x tensor."""
        return f"{self.replicate} x {self.shard} x {self.tensor}"
