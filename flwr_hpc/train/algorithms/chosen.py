"""Which algorithms an order asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flwr_hpc.protocol import CORRECTION, MEAN_GRADIENT, Order
from flwr_hpc.train.algorithms.base import Algorithm
from flwr_hpc.train.algorithms.fedprox import FedProx
from flwr_hpc.train.algorithms.scaffold import Scaffold
from flwr_hpc.train.trainer import Trainer


def chosen(trainer: Trainer, order: Order, extra_arrays: Mapping[str, Path]) -> list[Algorithm]:
    """Return an order's own algorithms, in the order in which they change gradients."""
    algorithms: list[Algorithm] = []
    correction = extra_arrays.get(CORRECTION)
    if correction or order.options.get(MEAN_GRADIENT):
        algorithms.append(Scaffold(trainer, correction))
    if mu := float(order.options.get("proximal-mu", 0.0)):
        algorithms.append(FedProx(trainer, mu))
    return algorithms
