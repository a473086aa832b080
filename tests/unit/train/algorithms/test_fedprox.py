"""FedProx: the pull of an order's start on its gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flwr_hpc.protocol import Order
from flwr_hpc.train.algorithms.chosen import chosen
from flwr_hpc.train.algorithms.fedprox import FedProx
from flwr_hpc.train.algorithms.scaffold import Scaffold

ORDER = Order("run", "a", 0, "train")


def trainer(value: float) -> Any:
    return SimpleNamespace(trained={"w": torch.nn.Parameter(torch.tensor([value]))})


def test_the_start_of_an_interrupted_order_is_kept() -> None:
    """Protects an order that another job ends: it is pulled to where the first one began."""
    first = trainer(1.0)
    began = FedProx(first, mu=0.5)
    began.begin(ORDER)
    with torch.no_grad():
        first.trained["w"].fill_(5.0)
    second = trainer(5.0)
    again = FedProx(second, mu=0.5)
    again.resume(ORDER)
    again.tensors()["start.w"].copy_(began.tensors()["start.w"])  # as a checkpoint does
    again.gradients()
    assert second.trained["w"].grad.item() == pytest.approx(0.5 * (5.0 - 1.0))
    again.end(ORDER)
    assert again.tensors() == {}, "a finished order's checkpoint does not hold it"


def test_an_order_brings_the_algorithms_it_asks_for() -> None:
    """Protects plain orders from the memory and time of others' algorithms."""
    plain = trainer(1.0)
    pulled = Order("run", "a", 0, "train", options={"proximal-mu": 0.1})
    both = Order("run", "a", 0, "train", options={"proximal-mu": 0.1, "mean-gradient": True})
    assert chosen(plain, ORDER, {}) == []
    assert [type(a) for a in chosen(plain, pulled, {})] == [FedProx]
    assert [type(a) for a in chosen(plain, both, {})] == [Scaffold, FedProx]
