"""Exact strategies for adapters over scripted sites: a version is the average of their models."""

from __future__ import annotations

import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from worlds.strategies import grid as grid_world
from worlds.strategies import world as world_module
from worlds.strategies.grid import FakeSite
from worlds.strategies.toy_model import as_numpy, pull_towards
from worlds.strategies.world import Killed, World

from flwr_hpc.protocol import ARRAYS, ORDER, RESIDUAL, Order, from_json
from strategies.engine.runtime import RunFailed
from strategies.fedavg import FedAvg
from strategies.lora.fedex_lora import FedExLora
from strategies.lora.flora import FLoRA
from strategies.parts.rules import normalised

A, B = "q.lora_A.weight", "q.lora_B.weight"
TARGETS = {"a": 1.0, "b": -2.0, "c": 3.0}
EXAMPLES = {"a": 10, "b": 30, "c": 20}

both = pytest.mark.parametrize("kind", [FedExLora, FLoRA])


def adapter():
    """Return an adapter of rank 2 as it is after some training: B is not 0."""
    rng = np.random.default_rng(3)
    tensors = {A: rng.normal(size=(2, 7)), B: rng.normal(size=(5, 2))}
    return ArrayRecord({n: Array(t.astype(np.float32)) for n, t in tensors.items()})


@pytest.fixture(autouse=True)
def of_adapters(monkeypatch):
    """The scripted sites train an adapter."""
    monkeypatch.setattr(grid_world, "NAMES", (B, A))
    for module in (grid_world, world_module):
        monkeypatch.setattr(module, "initial_arrays", adapter)


def sites(names="abc"):
    return [FakeSite(n, TARGETS[n], examples=EXAMPLES[n]) for n in names]


def product(tensors):
    """Return the dense B A, or U V, of tensors; 0 of none."""
    if not tensors:
        return np.zeros((5, 7))
    return tensors[B].astype(np.float64) @ tensors[A].astype(np.float64)


def served(kind=FedExLora, rounds=5, names="abc", **options):
    """Run; return the world, the strategy, the last weights and what each version had with it."""
    made = []
    world = World(sites(names), rounds=rounds)
    result = world.serve(lambda: made.append(kind(**options)) or made[-1])
    sent = {}
    for message in (m for m in world.grid.pushed if ORDER in m.content and ARRAYS in m.content):
        order = from_json(Order, str(message.content[ORDER]["json"]))
        found = tuple(as_numpy(message.content.get(key, {})) for key in (ARRAYS, RESIDUAL))
        for one, other in zip(found, sent.setdefault(order.version, found), strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in other), order.id
    return world, made[-1], as_numpy(result.arrays), sent


@both
def test_every_version_is_the_average_of_the_models(kind):
    """Protects the claim: W0 + B A + U V of a version, against those of its replies, averaged."""
    world, strategy, last, sent = served(kind)
    sent[5] = last, as_numpy(strategy.residual)
    c = normalised([float(EXAMPLES[n]) for n in "abc"])
    apart = []
    for version in range(5):
        theta, before = sent[version]
        replies = [pull_towards(TARGETS[n])(theta, 10) for n in "abc"]
        expected = sum(w * product(r) for w, r in zip(c, replies, strict=True)) + product(before)
        after, residual = sent[version + 1]
        np.testing.assert_allclose(product(after) + product(residual), expected, rtol=2e-6)
        apart.append(np.linalg.norm(product(after) + product(before) - expected))
    assert min(apart) > 0.1  # what averaging apart would have been wrong by
    told = world.events("aggregated")
    assert all(e["lora_inexactness"] < 1e-8 for e in told)
    assert all(e["lora_inexactness_removed"] > 0.01 for e in told)


def test_what_was_removed_is_what_fedavg_has():
    """One version of both, from the same weights: the same figure, here as removed."""
    plain = World(sites(), rounds=1)
    plain.serve(FedAvg)
    world, *_ = served(rounds=1)
    assert world.events("aggregated")[0]["lora_inexactness_removed"] == pytest.approx(
        plain.events("aggregated")[0]["lora_inexactness"], rel=1e-6
    )


@both
def test_the_last_version_is_evaluated_with_its_residual(kind):
    """Protects the held-out loss of the end: it is of what the run leaves."""
    world, strategy, last, sent = served(kind, rounds=2)
    assert world.events("evaluated")[-1]["version"] == 2
    theta, residual = sent[2]  # of the evaluations
    assert all(np.array_equal(theta[name], last[name]) for name in last)
    assert all(np.array_equal(residual[k], x) for k, x in as_numpy(strategy.residual).items())


@both
def test_a_cut_residual_says_what_it_lacks(kind):
    """Protects those who bound its size: the figure is no longer 0 but that of the cut."""
    world, strategy, last, _ = served(kind, rounds=4, rank=1)
    assert {e["lora_residual_rank"] for e in world.events("aggregated")} == {1}
    assert len(strategy.residual[A].numpy()) == 1
    figures = [e["lora_inexactness"] for e in world.events("aggregated")]
    assert max(figures) > 0.0
    assert np.isfinite(product(last)).all()


def test_adapters_begin_anew_after_each_round():
    """Protects FLoRA's rounds: no adapter is added twice, and no two rounds have one A."""
    _, _, last, sent = served(FLoRA, rounds=3)
    after = [theta for version, (theta, _) in sent.items() if version] + [last]
    assert not any(theta[B].any() for theta in after)
    assert len({theta[A].tobytes() for theta in after}) == 3
    assert all(0 < abs(theta[A]).max() <= 7**-0.5 for theta in after)


def test_one_site_leaves_no_residual():
    """It is its own average."""
    world, strategy, *_ = served(rounds=2, names="a")
    assert not product(as_numpy(strategy.residual)).any()
    assert world.events("aggregated")[-1]["lora_inexactness_removed"] == 0.0


@both
def test_killed_at_every_moment_the_residual_is_the_same_to_the_bit(kind):
    """Wherever the server dies, adapter and residual of the resumed run are of the same bits."""

    def run(world, **kill):
        made = []
        try:
            result = world.serve(lambda: made.append(kind()) or made[-1], **kill)
        except Killed:
            return None
        return as_numpy(result.arrays) | {
            f"residual {k}": x for k, x in as_numpy(made[-1].residual).items()
        }

    whole = World(sites(), rounds=3)
    expected = run(whole)
    for k in range(0, whole.moments, 2):
        world = World(sites(), rounds=3)
        assert run(world, die_at=k) is None
        found = run(world)
        assert all(np.array_equal(found[name], x) for name, x in expected.items()), k


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"late": "merge"}, "late='merge'"),
        ({"outer_lr": 0.5}, "outer_lr=0.5 would make no average"),
        ({"average": 0.0}, "average=0.0 would make no average"),
        ({"rank": 0}, "rank=0 must be greater than zero"),
    ],
)
def test_what_would_make_no_average_of_models_is_refused(options, says):
    """A late update is of other frozen weights; a step of half the way is no average."""
    with pytest.raises(ValueError, match=re.escape(says)):
        FedExLora(**options)


@both
def test_an_ordinary_client_app_is_refused(kind):
    """It would train over frozen weights that lack the residual, without a word."""
    world = World([FakeSite("x", 1.0, plain=True)])
    with pytest.raises(RunFailed, match="cannot add factors"):
        world.serve(kind)


@both
def test_other_adapters_are_refused_before_anybody_trains(kind, monkeypatch):
    """Those of an embedding, whose product is another."""
    odd = {"e.lora_embedding_A": np.ones((2, 7), np.float32)}
    made = ArrayRecord({n: Array(t) for n, t in (as_numpy(adapter()) | odd).items()})
    monkeypatch.setattr(grid_world, "initial_arrays", lambda: made)
    world = World(sites())
    with pytest.raises(RunFailed, match=r"e\.lora_embedding_A"):
        world.serve(kind)
    assert not any(order.kind == "train" for site in world.sites for order in site.orders)
