"""What a strategy yields is checked before it becomes a version."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import NAMES, as_numpy, initial_arrays
from worlds.strategies.world import ANY_NUMBER, run_scripted

from strategies import (
    AsyncStrategy,
    HpcStrategy,
    RunFailed,
    Runtime,
    WindowStrategy,
    run_strategy,
)


def broken(how, tensors):
    """Return weights with one thing wrong."""
    first, *others = tensors.items()
    name, tensor = first
    return {
        "missing": dict(others),
        "unknown": {**tensors, "more": tensor},
        "shape": {**tensors, name: tensor[:1]},
        "nan": {**tensors, name: tensor * np.float32("nan")},
        "overflow": {**tensors, name: tensor.astype(np.float64) + 1e300},
        "no pairs": [name, others[0][0]],
        "nothing": {},
        "twice": [first, first, *others],
    }[how]


class Gives(AsyncStrategy):
    """Returns what it is told to, made of the newest weights."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def on_result(self, result, staleness):
        return self.make({k: a.numpy() for k, a in self.arrays.items()})


class Merges(WindowStrategy):
    """The same for a window."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def merge(self, updates, weights):
        return self.make({k: a.numpy() for k, a in self.arrays.items()})


class Aggregates(HpcStrategy):
    """The same for a round."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def aggregate(self, server_round, trained, weights):
        return self.make({k: a.numpy() for k, a in self.arrays.items()})


class OfFlower(FlowerFedAvg):
    """The same for a strategy of Flower's."""

    def __init__(self, make):
        super().__init__(**ANY_NUMBER)
        self.make = make

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        made = self.make(as_numpy(arrays))
        return ArrayRecord({k: Array(w) for k, w in dict(made).items()}), metrics


KINDS = [Gives, Merges, Aggregates, OfFlower]
each_kind = pytest.mark.parametrize("kind", KINDS)


FAULTS = {
    "missing": "layer.weight is missing",
    "unknown": "'more', which the model has not",
    "shape": "shape",
    "nan": "not finite",
    "overflow": "too large",
    "nothing": "missing",
}


@each_kind
@pytest.mark.parametrize("how", FAULTS)
def test_weights_that_are_no_version_end_the_run(kind, how):
    """A tensor that is missing, unknown, misshapen or no number never becomes the model."""
    if kind is OfFlower and how in ("nothing", "overflow"):
        return  # no weights at all are a failed round, and Flower has only its own float32

    def make(tensors):
        return broken(how, tensors)

    with pytest.raises(RunFailed, match=FAULTS[how]) as told:
        run_scripted(kind(make))
    assert kind is OfFlower or kind.__name__ in str(told.value)


@pytest.mark.parametrize("how", ["no pairs", "twice"])
@pytest.mark.parametrize("kind", [Gives, Merges, Aggregates])
def test_pairs_that_are_none(kind, how):
    """What is yielded are pairs of name and tensor, each name once."""
    with pytest.raises(RunFailed, match=r"pair of a name|twice"):
        run_scripted(kind(lambda tensors: broken(how, tensors)))


@each_kind
def test_versions_have_the_models_dtype(kind):
    """float64 from numpy's arithmetic must not make the model twice as large."""

    def double(tensors):
        return {k: w.astype(np.float64) + 1.0 for k, w in tensors.items()}

    result = run_scripted(kind(double), rounds=2)
    assert {a.numpy().dtype for a in result.arrays.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", [Gives, Merges, Aggregates])
def test_a_mapping_or_pairs(kind):
    """Both are new weights."""
    results = [
        as_numpy(run_scripted(kind(make)).arrays)
        for make in (
            lambda tensors: {k: w + 1 for k, w in tensors.items()},
            lambda tensors: ((k, w + 1) for k, w in tensors.items()),
        )
    ]
    for name in NAMES:
        np.testing.assert_array_equal(results[0][name], results[1][name])


def test_a_generator_is_never_none():
    """`return None` in a function with `yield` says something else than its author means."""

    class Waits(AsyncStrategy):
        def on_result(self, result, staleness):
            if result.order.seq == 0:
                return None
            yield from ((k, a.numpy()) for k, a in self.arrays.items())

    with pytest.raises(RunFailed, match=r"Waits.on_result yielded nothing.*generator"):
        run_scripted(Waits())


def test_nothing_is_committed_of_refused_weights():
    """The version before is what a resumed run goes on from."""

    class Spoils(Gives):
        def on_result(self, result, staleness):
            new = super().on_result(result, staleness)
            return broken("nan", new) if self.version == 1 else new

    grid = FakeGrid([FakeSite("a", 1.0)])
    runtime = Runtime(clock=grid.clock)
    config = ConfigRecord({"steps": 5})
    with pytest.raises(RunFailed):
        run_strategy(Spoils(dict), grid, initial_arrays(), 3, train_config=config, runtime=runtime)
    assert runtime.checkpoints.restore()["version"] == 1
