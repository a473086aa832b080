"""Replies of ordinary ClientApps, made alike for strategies of Flower's."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import as_numpy, initial_arrays

from strategies.base.start import run_strategy
from strategies.engine.flower.alike import make_alike, weight_key_of
from strategies.engine.runtime import Runtime, Settings

ANY_NUMBER = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


def further_arrays(content):
    content["further"] = ArrayRecord({"w": Array(np.zeros(3))})


def further_metrics(content):
    content["figures"] = MetricRecord({"num-examples": 10, "loss": 0.0})


def no_metrics(content):
    del content["metrics"]


def no_weight(content):
    del content["metrics"]["num-examples"]


def nan_weight(content):
    content["metrics"]["num-examples"] = float("nan")


def long_metric(content):
    content["metrics"]["loss"] = [1.0, 2.0]


def no_arrays(content):
    del content["arrays"]


SPOILERS = [
    further_arrays,
    further_metrics,
    no_metrics,
    no_weight,
    nan_weight,
    long_metric,
    no_arrays,
]
COUNT = (further_arrays, further_metrics, long_metric)  # their replies are good but for that


class Odd(FakeSite):
    """An ordinary ClientApp whose every reply is spoilt."""

    def _plain(self, message, now):
        at, content = super()._plain(message, now)
        if isinstance(content, RecordDict) and message.metadata.message_type == "train":
            self.spoils(content)
        return at, content


def train(strategy, sites, rounds=2):
    grid = FakeGrid(sites)
    grid.clock.limit = 100_000.0
    runtime = Runtime(clock=grid.clock, settings=Settings(retries=0))
    config = ConfigRecord({"steps": 5})
    result = run_strategy(
        strategy, grid, initial_arrays(), rounds, train_config=config, runtime=runtime
    )
    return as_numpy(result.arrays)


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("honest", [1, 2])
def test_one_odd_reply_does_not_end_the_run(spoil, honest):
    """FedAvg would raise out of the round; the honest sites' work counts, here as ever."""
    good = [FakeSite(n, t, plain=True) for n, t in zip("ab", (1.0, 3.0), strict=True)][:honest]
    odd = Odd("odd", -1.0, plain=True)
    odd.spoils = spoil
    found = train(FedAvg(**ANY_NUMBER), [*good, odd])
    peers = [*good, FakeSite("odd", -1.0, plain=True)] if spoil in COUNT else good
    expected = train(FedAvg(**ANY_NUMBER), [FakeSite(s.name, s.target, plain=True) for s in peers])
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5)


def reply(node, **records):
    sent = Message(RecordDict(), dst_node_id=node, message_type="train")
    return Message(RecordDict(records), reply_to=sent)


def test_weights_that_are_all_zero_are_errors():
    """The mean would be divided by zero."""
    FakeGrid([])  # tells Flower who creates messages
    metrics = MetricRecord({"num-examples": 0})
    arrays = ArrayRecord({"w": Array(np.zeros(3))})
    replies = [reply(n, arrays=arrays, metrics=metrics) for n in (1, 2)]
    assert all(r.has_error() for r in make_alike(replies, "num-examples"))


def test_a_strategy_that_makes_no_demands_gets_what_was_sent():
    """Somebody's own strategy may want another record of every site."""
    FakeGrid([])
    replies = [reply(n, **{f"arrays-{n}": ArrayRecord({"w": Array(np.zeros(n))})}) for n in (1, 2)]
    found = make_alike(replies, None)
    assert [list(r.content) for r in found] == [["arrays-1"], ["arrays-2"]]


def test_the_weight_is_that_of_the_strategy_within():
    """Differential privacy wraps the strategy that weighs."""
    inner = FedAvg(weighted_by_key="tokens")
    wrapper = DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, 2)
    assert weight_key_of([wrapper, inner]) == "tokens"
    assert weight_key_of([]) is None
