"""Adapters of a site whose rank is smaller than the run's (FLoRA, arXiv 2409.05976).

The site trains the first rows of A and columns of B, with the run's scale alpha / r. They travel in
the run's shapes: B with columns of zeros, so that B A is what was trained, and A with the rows
that came, so that an update has nothing of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flwr_hpc.exchange.shards.manifest import WeightFiles
from flwr_hpc.exchange.tensors import Layout, TensorInfo, widen
from flwr_hpc.train.lora.residual import A, B
from flwr_hpc.train.parallel.tensors import full


@dataclass
class AdapterRank:
    """The ranks of a site's adapters and of the run's; nothing changes where they are the same.

    Parameters
    ----------
    own, run : int
        0 without adapters.
    """

    own: int
    run: int
    _rows: dict[str, Tensor] = field(default_factory=dict)  # of A, those that came beyond `own`

    @property
    def is_smaller(self) -> bool:
        return self.own < self.run

    def layout(self, tensors: Layout) -> dict[str, TensorInfo]:
        """Return the shapes in which tensors travel."""
        return {n: TensorInfo(i.dtype, self._shape(n, i.shape)) for n, i in tensors.items()}

    def keep_rest(self, path: Path, layout: Layout) -> None:
        """Keep what of weights that have come is not trained here."""
        if self.is_smaller:
            weights = WeightFiles.open(path).whole
            for name in (name for name in layout if name.endswith(A)):
                rows = weights.rows(name, self.own, self.run)
                self._rows[name] = torch.from_numpy(widen(rows, weights.layout[name].dtype))

    def widened(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor as it travels; a collective call."""
        shape = self._shape(name, tuple(tensor.shape))
        if shape == tuple(tensor.shape):
            return tensor
        whole = full(tensor)
        if name.endswith(A):
            return torch.cat([whole, self._rows.get(name, _drawn(len(whole), shape))])
        return torch.nn.functional.pad(whole, (0, shape[1] - whole.shape[1]))

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name.endswith(A):
            return (self.run, *shape[1:])
        return (shape[0], self.run) if name.endswith(B) else shape


def _drawn(before: int, shape: tuple[int, ...]) -> Tensor:
    """Return the further rows of an A that begins here, uniform as peft draws them."""
    draw, bound = torch.Generator().manual_seed(before), 1.0 / math.sqrt(shape[1])
    return torch.empty(shape[0] - before, shape[1]).uniform_(-bound, bound, generator=draw)
