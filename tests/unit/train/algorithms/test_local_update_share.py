"""An order that starts from its weights plus a share of the site's last update."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flwr_hpc.protocol import Order
from flwr_hpc.train.algorithms.local_update_share import LocalUpdate


@pytest.fixture
def trainer() -> Any:
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    return SimpleNamespace(weights=weights, shards=lambda: weights)


def order(seq: int, **options: Any) -> Order:
    return Order("run", "a", seq, "train", options=options)


def train(trainer: Any, by: float) -> None:
    for weight in trainer.weights:
        weight += by


def read(trainer: Any, value: float) -> None:
    for weight in trainer.weights:
        weight.fill_(value)


def test_a_share_of_the_last_update_is_added(trainer: Any) -> None:
    """Protects the overlap: the order starts where the server's merge of the last will lead."""
    own = LocalUpdate(trainer)
    assert own.begin(order(4, **{"local-update-share": 0.0})) == {}
    train(trainer, 8.0)
    own.end(order(4))
    read(trainer, 10.0)
    assert own.begin(order(5, **{"local-update-share": 0.25})) == {
        "local_update_share": 0.25,
        "local_update_seq": 4.0,
    }
    assert [w.unique().tolist() for w in trainer.weights] == [[12.0], [12.0]]
    train(trainer, 1.0)
    own.end(order(5))
    read(trainer, 0.0)
    own.begin(order(6, **{"local-update-share": 1.0}))
    assert trainer.weights[0].tolist() == [1.0, 1.0]  # its own movement, not the share before it


def test_nothing_is_remembered_unasked(trainer: Any) -> None:
    """Protects memory, and an order from an update that the server does not know of."""
    own = LocalUpdate(trainer)
    own.begin(order(0))
    train(trainer, 1.0)
    own.end(order(0))
    read(trainer, 5.0)
    assert own.begin(order(1, **{"local-update-share": 0.5})) == {}
    assert trainer.weights[0].tolist() == [5.0, 5.0]
    own.end(order(1))
    own.forget()
    assert own.begin(order(2, **{"local-update-share": 0.5})) == {}
