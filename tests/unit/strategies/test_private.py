"""Differential privacy around rounds: against Flower's own wrapper, and against its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
)
from worlds.strategies.grid import FakeSite, name_this_process
from worlds.strategies.toy_model import as_numpy
from worlds.strategies.world import ANY_NUMBER, World, finite, sites

from flwr_hpc.errors import UserError
from flwr_hpc.protocol import WEIGHT_KEY
from flwr_hpc.server.strategy_factory import build_strategy
from strategies.diloco import DiLoCo
from strategies.engine.runtime import RunFailed, Settings
from strategies.fedbuff import FedBuff
from strategies.parts import privacy
from strategies.private import Private

SHAPES = {"w": (40, 50), "b": (30,)}


def record(seed, length):
    """Return tensors that are `length` long together."""
    rng = np.random.default_rng(seed)
    found = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    norm = math.sqrt(sum(float((x**2).sum()) for x in found.values()))
    return {name: (x * length / norm).astype(np.float32) for name, x in found.items()}


BASE = record(0, 10.0)
UPDATES = [record(1, 0.3), record(2, 5.0), record(3, 40.0)]


def made(tensors):
    return ArrayRecord({name: Array(x) for name, x in tensors.items()})


def replies(updates=UPDATES, examples=8):
    """Return what sites answer that have moved so far."""
    name_this_process()
    return [
        Message(
            RecordDict(
                {
                    "arrays": made({name: BASE[name] + x for name, x in update.items()}),
                    "metrics": MetricRecord({WEIGHT_KEY: examples}),
                }
            ),
            *(k + 1, "train"),
        )
        for k, update in enumerate(updates)
    ]


def aggregated(strategy, answers=None):
    """Have a strategy aggregate one round, and return how far it went from the base."""
    arrays, nodes = made(BASE), type("Nodes", (), {"get_node_ids": lambda self: []})()
    if isinstance(strategy, Private) and isinstance(strategy.strategy, DiLoCo):
        strategy.strategy.arrays = arrays
    else:
        list(strategy.configure_train(1, arrays, ConfigRecord(), nodes) or ())
    strategy.arrays = strategy.current_arrays = arrays
    new, metrics = strategy.aggregate_train(1, answers or replies())
    return {k: x - BASE[k] for k, x in as_numpy(new).items()}, dict(metrics)


def inner():
    return FedAvg(fraction_train=0.0, min_train_nodes=0, min_available_nodes=0)


def test_without_noise_it_is_flowers_wrapper():
    """Protects the clipping: the same replies, of which some are too long, give the same mean."""
    ours, told = aggregated(Private(inner(), clip=2.0, noise_multiplier=0.0))
    theirs, _ = aggregated(DifferentialPrivacyServerSideFixedClipping(inner(), 0.0, 2.0, 3))
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, atol=1e-6)
    assert told["dp_clip_norm"] == 2.0
    assert "dp_epsilon" not in told


@pytest.mark.parametrize("make", [inner, lambda: DiLoCo(outer_lr=1.0, momentum=0.0)])
def test_the_noise_is_as_large_as_flowers(make):
    """Protects the noise: normal, z C / n in the mean, the same for all tensors and no other."""
    quiet, _ = aggregated(Private(make(), clip=2.0, noise_multiplier=0.0))
    ours, _ = aggregated(Private(make(), clip=2.0, noise_multiplier=1.5))
    theirs, _ = aggregated(DifferentialPrivacyServerSideFixedClipping(inner(), 1.5, 2.0, 3))
    stddev = 1.5 * 2.0 / 3
    for found in (ours, theirs):
        noise = (found["w"] - quiet["w"]).reshape(-1) / stddev
        assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
        assert noise.std() == pytest.approx(1.0, abs=5 / math.sqrt(2 * noise.size))
        assert np.mean(np.abs(noise) < 1.0) == pytest.approx(0.6827, abs=0.06)


def test_noise_is_the_same_at_every_reading_and_of_no_other_round():
    """A rule may read a tensor twice; two tensors or rounds must not share their noise."""
    base, zero = made(BASE), made({name: np.zeros_like(x) for name, x in BASE.items()})
    noisy = privacy.with_noise(zero, zero, 1.0, privacy.gaussian(7, 1.0))
    again = privacy.with_noise(zero, zero, 1.0, privacy.gaussian(8, 1.0))
    np.testing.assert_array_equal(noisy["w"].numpy(), noisy["w"].numpy())
    assert (
        abs(np.corrcoef(noisy["w"].numpy().reshape(-1), again["w"].numpy().reshape(-1))[0, 1])
        < 0.15
    )
    assert not np.array_equal(noisy["w"].numpy().reshape(-1)[:30], noisy["b"].numpy())
    whole, cell = privacy.gaussian(7, 1.0)("w", noisy["w"]), privacy.CELL
    large = replace(whole, shape=(3 * cell,))
    parts = [slice(0, 10), slice(10, cell + 5), slice(cell + 5, 3 * cell)]
    in_parts = np.concatenate([large.reader()(part) for part in parts])
    np.testing.assert_array_equal(in_parts, large.numpy())
    assert len(np.unique(in_parts)) == in_parts.size
    rounds = [aggregated(Private(inner(), clip=1.0))[0]["b"] for _ in range(2)]
    assert not np.array_equal(*rounds)
    assert base["w"].numpy().dtype == noisy["w"].numpy().dtype


def test_who_claims_many_examples_counts_as_one():
    """Protects the bound on a site's part: weights would be in its hands."""
    some = replies()
    some[1].content["metrics"][WEIGHT_KEY] = 10**6
    claimed, _ = aggregated(Private(inner(), clip=2.0, noise_multiplier=0.0), some)
    plain, _ = aggregated(Private(inner(), clip=2.0, noise_multiplier=0.0))
    np.testing.assert_allclose(claimed["w"], plain["w"], atol=1e-7)


def test_the_clipping_norm_finds_its_quantile():
    """Protects the direction of its steps: from far below and far above, C ends at the median."""
    lengths = [0.5, 1.0, 2.0, 4.0, 8.0]
    for first in (0.01, 1000.0):
        strategy = Private(inner(), clip=first, noise_multiplier=0.0, quantile=0.5)
        for _ in range(200):
            aggregated(strategy, replies([record(k, x) for k, x in enumerate(lengths)]))
        assert 1.0 < strategy.clip < 4.0


def test_a_noisy_count_raises_the_noise_of_the_updates():
    """Both together are as private as was asked; a count that is too exact is refused."""
    rest = privacy.noise_apart(1.0, 1.0)
    assert rest**-2 + 2.0**-2 == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"count_noise=0\.5 must be above"):
        Private(inner(), noise_multiplier=1.0, quantile=0.5, count_noise=0.5)


@pytest.mark.parametrize(
    ("z", "rounds", "delta"), [(1.0, 1, 1e-5), (0.5, 20, 1e-6), (4.0, 100, 1e-5)]
)
def test_epsilon_is_that_of_the_gaussian_mechanism(z, rounds, delta):
    """Protects the figure: against its definition, integrated over the mechanism's outputs."""
    found, mu = privacy.epsilon(z, rounds, delta), math.sqrt(rounds) / z
    x = np.linspace(-40.0 - 2 * mu, 40.0 + 2 * mu, 2_000_001)
    with np.errstate(over="ignore"):
        p, q = (np.exp(-((x - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (mu, 0.0))
        over = np.maximum(p - math.exp(found) * q, 0.0)
    assert np.sum(over) * (x[1] - x[0]) == pytest.approx(delta, rel=1e-3)


def test_epsilon_at_the_ends():
    """No release costs nothing, no noise protects nothing, and large ones do not overflow."""
    assert privacy.epsilon(1.0, 0, 1e-5) == 0.0
    assert privacy.epsilon(0.0, 1, 1e-5) == math.inf
    assert 1000.0 < privacy.epsilon(0.01, 1, 1e-5) < 10_000.0
    assert privacy.epsilon(1.0, 2, 1e-5) > privacy.epsilon(1.0, 1, 1e-5)


def test_a_run_with_noise_goes_on_after_its_end():
    """Releases and C survive; epsilon counts every version once."""

    def make():
        return Private(FedAdam(**ANY_NUMBER), clip=1.0, noise_multiplier=1.5, quantile=0.5)

    world = World(sites(), rounds=2)
    finite(world.serve(make))
    world.rounds = 4
    result = world.serve(make)
    finite(result)
    told = result.train_metrics_clientapp
    assert [told[r]["dp_epsilon"] for r in (1, 2, 3, 4)] == pytest.approx(
        [privacy.epsilon(1.5, r, 1e-5) for r in (1, 2, 3, 4)]
    )
    assert len({told[r]["dp_clip_norm"] for r in (1, 2, 3, 4)}) == 4


def test_too_few_updates_make_no_version():
    """Their noise would drown them."""
    world = World([FakeSite("a", 1.0)], Settings(max_failed_rounds=2))
    with pytest.raises(RunFailed, match="2 rounds in a row"):
        world.serve(lambda: Private(inner(), min_updates=2))


@pytest.mark.parametrize(
    ("make", "says"),
    [(FedBuff, "by its own loop"), (FedMedian, "not known to step along the mean")],
)
def test_what_the_noise_is_not_sized_for_is_refused(make, says):
    """An asynchronous strategy, a median: nothing would be as private as it is told."""
    with pytest.raises(ValueError, match=says):
        Private(make())


FLOWERS = "flwr.serverapp.strategy."
ARGUMENTS = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "num_sampled_clients": 2}


@pytest.mark.parametrize(
    ("kind", "wrapped", "says"),
    [
        ("ClientSide", f"{FLOWERS}FedAvg", "nothing would be clipped"),
        ("ServerSide", "strategies.fedbuff.FedBuff", "has a loop of its own"),
    ],
)
def test_flowers_wrappers_that_would_do_something_else_are_refused(kind, wrapped, says):
    """Without their mod nothing is clipped; around FedBuff they would run FedAvg."""
    target = f"{FLOWERS}DifferentialPrivacy{kind}FixedClipping"
    with pytest.raises(UserError, match=says):
        build_strategy({"_target_": target, "strategy": {"_target_": wrapped}, **ARGUMENTS})
