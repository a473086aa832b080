"""Control variates of SCAFFOLD (arXiv 1910.06378), shard by shard.

An order may carry a correction ``c - c_i`` that is added to every gradient, and is answered with
the mean of the gradients without it. Both are float32, as the weights and their gradients are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flwr_hpc.exchange.tensors import Layout
from flwr_hpc.train.optim import gradient
from flwr_hpc.train.parallel import full, local, put
from flwr_hpc.train.weights import read_weights


class ControlVariates:
    """Sums up one order's gradients and corrects them; as much memory as the weights, or twice.

    Parameters
    ----------
    trained : mapping of str to Tensor
        This rank's view of the parameters, by the name under which they travel.
    """

    def __init__(self, trained: Mapping[str, Tensor]) -> None:
        self._trained = trained
        self._sums = _zeros(trained)
        self._correction: dict[str, Tensor] = {}

    def read(self, path: Path, layout: Layout) -> None:
        """Take over a correction; each rank reads the file and keeps its shard.

        Parameters
        ----------
        path : Path
        layout : Layout
            Of what travels; what of it is not trained needs no correction.
        """
        self._correction = _zeros(self._trained)
        for name, value in read_weights(path, layout):
            if name in self._correction:
                put(value, self._correction[name])

    def apply(self) -> None:
        """Add this step's gradients to the sum, and then the correction to them."""
        grads = [gradient(p) for p in self._trained.values()]
        torch._foreach_add_([local(s) for s in self._sums.values()], grads)
        if self._correction:
            torch._foreach_add_(grads, [local(c) for c in self._correction.values()])

    def mean(self, steps: int, travel: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield the mean gradient, one whole tensor at a time; a collective generator.

        What travels without being trained has the gradient zero.
        """
        for name, tensor in travel.items():
            summed = self._sums.get(name)
            yield torch.zeros_like(full(tensor)) if summed is None else full(summed) / max(1, steps)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint of a running order has to hold besides; filled in place."""
        return {f"gradient_sum.{name}": s for name, s in self._sums.items()}


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t.detach()) for name, t in tensors.items()}
