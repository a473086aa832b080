"""FedProx (arXiv 1812.06127): a pull towards the weights that an order starts from."""

from __future__ import annotations

from torch import Tensor

from flwr_hpc.protocol import Order
from flwr_hpc.train.algorithms.base import Algorithm, Write
from flwr_hpc.train.optim import gradient
from flwr_hpc.train.parallel.tensors import local
from flwr_hpc.train.trainer import Trainer


class FedProx(Algorithm):
    """Adds ``mu (w - w_start)`` to the gradient; as much memory as the weights.

    Parameters
    ----------
    trainer : Trainer
    mu : float
    """

    def __init__(self, trainer: Trainer, mu: float) -> None:
        self._trained = trainer.trained
        self._mu = mu
        self._start: dict[str, Tensor] = {}

    def begin(self, order: Order) -> dict[str, float]:
        self._start = {name: t.detach().clone() for name, t in self._trained.items()}
        return {}

    def gradients(self) -> None:
        for name, parameter in self._trained.items():
            pull = local(parameter).detach() - local(self._start[name])
            gradient(parameter).add_(pull, alpha=self._mu)

    def tensors(self) -> dict[str, Tensor]:
        return {f"start.{name}": start for name, start in self._start.items()}

    def end(self, *_: object) -> list[Write]:
        self._start = {}  # no further step: a checkpoint need not hold it
        return []
