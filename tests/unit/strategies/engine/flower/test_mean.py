"""Flower's FedAvg, computed block by block."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx

from flwr_hpc.simulate.identity import take_identity
from strategies.engine.flower.mean import aggregate
from strategies.parts import blocks

DTYPES = ("float32", "float64", "float16", "int64", "uint8")


def reply(node: int, **more) -> Message:
    rng = np.random.default_rng(node)
    arrays = {
        f"{dtype}{shape}": Array(np.asarray(100 * rng.random(shape), dtype))
        for dtype in DTYPES
        for shape in ((), (3, 5), (0, 2))
    }
    metrics = MetricRecord({"num-examples": 10 * node, "loss": 1.0 / node})
    sent = Message(RecordDict(), dst_node_id=node, message_type="train")
    content = {"arrays": ArrayRecord(arrays), "metrics": metrics, **more}
    return Message(RecordDict(content), reply_to=sent)


@pytest.fixture
def replies() -> list[Message]:
    take_identity()
    return [reply(node) for node in (1, 2, 3)]


@pytest.mark.parametrize("block", [1, 4, 1000])
@pytest.mark.parametrize("kind", [FedAvg, FedProx])
def test_the_bits_are_flowers(replies, kind, block, monkeypatch):
    """Protects whoever changes over from Flower: the same mean of every dtype and shape."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    strategy = kind() if kind is FedAvg else kind(proximal_mu=0.1)
    arrays, metrics = aggregate(strategy, 1, copy.copy(replies))
    exact, told = kind.aggregate_train(strategy, 1, replies)
    assert metrics == told
    assert list(arrays) == list(exact)
    for name, array in exact.items():
        found = np.asarray(arrays[name])
        assert (found.dtype, found.shape) == (array.numpy().dtype, array.numpy().shape), name
        np.testing.assert_array_equal(found, array.numpy())


def test_what_is_not_flowers_mean_is_left_to_the_strategy(replies):
    """Protects other rules of Flower's, and a user's metrics, which may be of the tensors."""
    seen = []

    def of_tensors(contents, key):
        seen.extend(len(c["arrays"]) for c in contents)
        return MetricRecord({"size": 1})

    arrays, metrics = aggregate(FedAvg(train_metrics_aggr_fn=of_tensors), 1, replies)
    assert isinstance(arrays, ArrayRecord)
    assert seen == [3 * len(DTYPES)] * 3
    assert metrics == MetricRecord({"size": 1})
    adam = FedAdam()
    adam.current_arrays = {n: a.numpy() for n, a in replies[0].content["arrays"].items()}
    assert isinstance(aggregate(adam, 1, replies)[0], ArrayRecord)


def test_replies_are_not_changed(replies):
    """Protects who reads them afterwards: what they weigh, and how unlike the adapters were."""
    aggregate(FedAvg(), 1, replies)
    assert all(len(r.content["arrays"]) == 3 * len(DTYPES) for r in replies)


def test_no_replies_make_no_weights():
    """Protects a round that failed: no version comes of it."""
    assert aggregate(FedAvg(), 1, []) == (None, None)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"w": np.ones((3, 2))}, "broadcast together with shapes"),
        ({"w": np.ones((2, 4))}, "broadcast together with shapes"),
        ({"w": np.ones((2, 3)), "v": np.ones(2)}, "same keys"),
    ],
)
def test_unlike_replies_are_refused_as_flower_does(replies, other, says):
    """Protects the mean from numbers that are not each other's: their order alone says nothing."""
    for reply_, arrays in zip(replies, ({"w": np.ones((2, 3))}, other, other), strict=True):
        record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        reply_.content["arrays"] = record
    with pytest.raises((ValueError, InconsistentMessageReplies), match=says):
        aggregate(FedAvg(), 1, replies)
