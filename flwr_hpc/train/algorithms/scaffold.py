"""Control variates of SCAFFOLD (arXiv 1910.06378), shard by shard.

An order may carry a correction ``c - c_i`` that is added to every gradient, and is answered with
the mean of the gradients without it. Both are float32, as the weights and their gradients are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flwr_hpc.protocol import GRADIENT, MEAN_GRADIENT, Order
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.algorithms.base import Algorithm, Write
from flwr_hpc.train.optim import gradient
from flwr_hpc.train.parallel.tensors import local
from flwr_hpc.train.trainer import Trainer


class Scaffold(Algorithm):
    """Sums up one order's gradients and corrects them; as much memory as the weights, or twice.

    Parameters
    ----------
    trainer : Trainer
    correction : Path or None
        File of all that travels; what of it is not trained needs no correction.
    """

    def __init__(self, trainer: Trainer, correction: Path | None) -> None:
        self._trainer = trainer
        self._trained = trainer.trained
        self._sums = _zeros(self._trained)
        self._correction = _zeros(self._trained) if correction else {}
        if correction:
            trainer.load_extra(correction, self._correction)

    def gradients(self) -> None:
        """Add this step's gradients to the sum, and then the correction to them."""
        grads = [gradient(p) for p in self._trained.values()]
        torch._foreach_add_([local(s) for s in self._sums.values()], grads)
        if self._correction:
            torch._foreach_add_(grads, [local(c) for c in self._correction.values()])

    def end(self, order: Order, folder: OrderDir, steps: int) -> list[Write]:
        """Copy the mean gradient, if it was asked for."""
        if not order.options.get(MEAN_GRADIENT):
            return []
        staged = self._trainer.stage(folder.arrays(GRADIENT), self._mean(steps))
        return [lambda: {"extra_arrays": {GRADIENT: staged.publish()}}]

    def tensors(self) -> dict[str, Tensor]:
        return {f"gradient_sum.{name}": s for name, s in self._sums.items()}

    def _mean(self, steps: int) -> Iterator[tuple[str, Tensor]]:
        """Yield one tensor at a time; of what travels untrained the gradient is zero."""
        for name, tensor in self._trainer.exchanged.items():
            if (summed := self._sums.get(name)) is None:
                yield name, torch.zeros_like(tensor.detach())
            else:
                yield name, summed / max(1, steps)


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t.detach()) for name, t in tensors.items()}
