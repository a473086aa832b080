"""Centres of updates: by hand, against Flower's, in blocks, and with a wrong site among them."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from worlds.strategies.grid import FakeSite
from worlds.strategies.toy_model import array, as_numpy
from worlds.strategies.world import ANY_NUMBER, World

from strategies.fedavg import FedAvg
from strategies.parts import blocks, robust
from strategies.robust_fedavg import RobustFedAvg

TARGETS = (1.0, 1.5, 0.5, 1.2, -400.0)  # What the sites learn; the last one is wrong
NAMES = "abcde"
PAIRS = {
    "median": (FedMedian, {}, {"rule": "median"}),
    "trimmed mean": (FedTrimmedAvg, {"beta": 0.25}, {"rule": "trimmed_mean", "cut": 0.25}),
    "krum": (Krum, {"num_malicious_nodes": 1}, {"rule": "krum"}),
    "multi-krum": (
        MultiKrum,
        {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
        {"rule": "krum", "selected": 3},
    ),
}


def _sites():
    both = zip(NAMES, TARGETS, strict=True)
    return [FakeSite(name, target, examples=10) for name, target in both]


@pytest.mark.parametrize(("theirs", "their", "our"), PAIRS.values(), ids=PAIRS)
def test_the_same_as_flowers(theirs, their, our):
    """Protects whoever comes from Flower: the same replies make the same version."""
    expected = as_numpy(World(_sites()).serve(lambda: theirs(**ANY_NUMBER, **their)).arrays)
    found = as_numpy(World(_sites()).serve(lambda: RobustFedAvg(**our)).arrays)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("our", [our for _, _, our in PAIRS.values()], ids=PAIRS)
def test_a_wrong_site_moves_the_version_little(our):
    """Protects a run from one broken site, which the mean follows wherever it goes."""

    def furthest(strategy):
        arrays = as_numpy(World(_sites()).serve(lambda: strategy).arrays)
        return max(float(np.abs(tensor).max()) for tensor in arrays.values())

    assert furthest(FedAvg()) > 10
    assert furthest(RobustFedAvg(**our)) < 3


def test_krum_says_whom_it_took():
    """Protects the report: who is not in a version weighs nothing there."""
    strategy = RobustFedAvg(rule="krum", selected=2)
    World(_sites()).serve(lambda: strategy)
    weights = {name: strategy.reported_weight(name, 0, 5) for name in NAMES}
    assert sorted(weights.values()) == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert weights["e"] == 0.0


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_blocks_change_nothing(block, monkeypatch):
    """Protects large tensors: they are read some numbers at a time, with the same result."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    rng = np.random.default_rng(0)
    five = [rng.normal(size=(4, 9)).astype(np.float32) for _ in range(5)]
    np.testing.assert_array_equal(robust.median(five), np.median(np.stack(five), axis=0))
    middle = np.sort(np.stack(five), axis=0)[1:4].mean(axis=0)
    np.testing.assert_allclose(robust.trimmed_mean(five, 0.2), middle, rtol=1e-6)
    records = [ArrayRecord({"w": array(x)}) for x in five]
    expected = [[float(np.square(x - y).sum()) for y in five] for x in five]
    np.testing.assert_allclose(robust.squared_distances(records), expected, rtol=1e-5, atol=1e-5)


def test_krum_by_hand():
    """Protects the score: with n = 5 and f = 1, the two nearest neighbours count."""
    places = [0.0, 1.0, 1.1, 5.0, 9.0]
    records = [ArrayRecord({"w": array(np.array([x]))}) for x in places]
    # Scores: 1 + 1.21, 0.01 + 1, 0.01 + 1.21, 15.21 + 16, 16 + 62.41
    assert robust.krum(records, malicious=1, selected=1) == [1]
    assert robust.krum(records, malicious=1, selected=3) == [0, 1, 2]
    assert robust.krum(records[:1], malicious=1, selected=3) == [0]


@pytest.mark.parametrize(
    "wrong", [{"rule": "mode"}, {"cut": 0.5}, {"selected": 0}, {"weighted_by": "num-examples"}]
)
def test_settings_that_make_no_sense(wrong):
    """Protects from a typing error: it is said before the run."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RobustFedAvg(**wrong)
