"""One strategy's numbers against another's, and against a computation by hand, over a grid."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi
from worlds.strategies.grid import FakeGrid, FakeSite, name_this_process
from worlds.strategies.toy_model import as_numpy, initial_arrays, pull_towards
from worlds.strategies.world import ANY_NUMBER, ROUNDS, World, each, sites

from flwr_hpc.config.compose import compose_config
from flwr_hpc.protocol import WEIGHT_KEY
from flwr_hpc.server.strategy_factory import build_strategy
from strategies import HpcStrategy, Runtime, run_strategy
from strategies.diloco import DiLoCo
from strategies.fedavg import FedAvg as OurFedAvg
from strategies.fedbuff import FedBuff
from strategies.parts import blocks
from strategies.parts.blocks import as_is


def plain_grid(dtype: str = "float64") -> tuple[FakeGrid, ArrayRecord]:
    two = [
        FakeSite("x", 1.0, plain=True, examples=10),
        FakeSite("y", 2.0, plain=True, examples=30, step_s=5),
    ]
    return FakeGrid(two), initial_arrays(dtype)


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdam, FedYogi])
def test_flowers_strategies_do_as_in_flower(kind, monkeypatch):
    """run_strategy gives what Flower's own start gives: arrays and all metrics."""
    config = {"train_config": ConfigRecord({"steps": 3})}

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"norm": float(np.square(arrays["layer.bias"].numpy()).sum())})

    grid, arrays = plain_grid()
    theirs = kind(**ANY_NUMBER).start(grid, arrays, 4, evaluate_fn=evaluate, **config)
    grid, arrays = plain_grid()
    runtime = Runtime(clock=grid.clock)
    ours = run_strategy(
        kind(**ANY_NUMBER), grid, arrays, 4, evaluate_fn=evaluate, runtime=runtime, **config
    )
    for name, tensor in as_numpy(theirs.arrays).items():
        np.testing.assert_allclose(as_numpy(ours.arrays)[name], tensor, rtol=1e-12)
    for history in (
        "train_metrics_clientapp",
        "evaluate_metrics_clientapp",
        "evaluate_metrics_serverapp",
    ):
        expected, found = getattr(theirs, history), getattr(ours, history)
        assert set(found) == set(expected)
        for r in expected:
            assert dict(found[r]) == pytest.approx(dict(expected[r]), rel=1e-9)


@each
def test_large_tensors_are_averaged_as_small_ones_are(make, monkeypatch):
    """Protects models whose tensors are computed a block at a time: the same numbers."""
    whole = World(sites()).serve(make)
    monkeypatch.setattr(blocks, "BLOCK", 1)
    in_blocks = as_numpy(World(sites()).serve(make).arrays)
    for name, tensor in as_numpy(whole.arrays).items():
        np.testing.assert_allclose(in_blocks[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_dtype_of_the_model_is_kept():
    """Flower's FedAdam makes float64 of float32; a model keeps its dtype over the rounds."""
    grid, arrays = plain_grid("float32")
    result = run_strategy(FedAdam(**ANY_NUMBER), grid, arrays, 2, runtime=Runtime(clock=grid.clock))
    assert {x.dtype for x in as_numpy(result.arrays).values()} == {np.dtype("float32")}


@pytest.mark.parametrize(
    "ours",
    [
        HpcStrategy(),
        OurFedAvg(),
        DiLoCo(outer_lr=1.0, momentum=0.0, weighted_by="num-examples"),
        DiLoCo(outer_lr=1.0, momentum=0.0, weighted_by="num-examples", averaged_over="senders"),
    ],
    ids=["hpc strategy", "fedavg", "diloco with eta 1 and beta 0", "averaged over senders"],
)
def test_flowers_fedavg_and_ours(ours):
    """The same replies, sites of unequal examples: the same weights but for rounding."""
    found, expected = (
        as_numpy(World(sites()).serve(lambda s=strategy: s).arrays)
        for strategy in (ours, FedAvg(**ANY_NUMBER))
    )
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_flowers_fedadam_by_hand():
    """Our loop's rounds against `aggregate_train` called here, and against the formula."""
    strategy, moments = FedAdam(**ANY_NUMBER, eta=0.2), (0.9, 0.99)
    world = World([FakeSite("a", 1.0, examples=10), FakeSite("b", -3.0, examples=30, step_s=2)])
    found = as_numpy(world.serve(lambda: FedAdam(**ANY_NUMBER, eta=0.2)).arrays)
    theta = {k: v.astype(np.float64) for k, v in as_numpy(initial_arrays()).items()}
    m = {k: np.zeros_like(v) for k, v in theta.items()}
    v = {k: np.zeros_like(x) for k, x in theta.items()}
    for r in range(1, ROUNDS + 1):
        trained = [pull_towards(t)(theta, 10) for t in (1.0, -3.0)]
        strategy.current_arrays = theta
        theirs, _ = strategy.aggregate_train(r, [reply(trained[0], 10), reply(trained[1], 30)])
        rate = 0.2 * (1 - moments[1] ** (r + 1)) ** 0.5 / (1 - moments[0] ** (r + 1))
        for k in theta:
            delta = 0.25 * trained[0][k] + 0.75 * trained[1][k] - theta[k]
            m[k] = moments[0] * m[k] + (1 - moments[0]) * delta
            v[k] = moments[1] * v[k] + (1 - moments[1]) * delta**2
        theta = {k: x + rate * m[k] / (v[k] ** 0.5 + 1e-3) for k, x in theta.items()}
        for name, tensor in as_numpy(theirs).items():
            np.testing.assert_allclose(tensor, theta[name], rtol=1e-6)
    for name, tensor in theta.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5)


def reply(weights: dict[str, np.ndarray], examples: int) -> Message:
    """Return what a ClientApp answers."""
    name_this_process()
    arrays = ArrayRecord({k: Array(w) for k, w in weights.items()})
    metrics = MetricRecord({WEIGHT_KEY: examples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), 1, "train")


def test_diloco_by_hand():
    """Two rounds of two sites with momentum, computed here from the site's own training."""
    world = World([FakeSite("a", 1.0), FakeSite("b", -3.0, step_s=2)])
    found = as_numpy(world.serve(lambda: DiLoCo(outer_lr=0.7, momentum=0.9)).arrays)
    theta = {k: v.astype(np.float64) for k, v in as_numpy(initial_arrays()).items()}
    m = {k: np.zeros_like(v) for k, v in theta.items()}
    for _ in range(ROUNDS):
        trained = [pull_towards(t)(theta, 10) for t in (1.0, -3.0)]
        for k in theta:
            delta = theta[k] - (trained[0][k] + trained[1][k]) / 2
            m[k] = 0.9 * m[k] + delta
            theta[k] = theta[k] - 0.7 * (delta + 0.9 * m[k])
    for name, tensor in theta.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_sparseloco_by_hand():
    """Its file in `conf` averages each value over those who changed it; the others stay."""
    strategy = build_strategy(compose_config(["strategy=sparseloco"]).strategy)
    start, *ends = (
        ArrayRecord([np.array(values, np.float32)])
        for values in ([10, 10, 10], [8, 10, 10], [6, 7, 10])
    )
    strategy.arrays = start
    found = dict(strategy.aggregate(1, ends, [1.0, 1.0]))
    np.testing.assert_array_equal(as_is(*found.values()), [7, 7, 10])


def test_fedbuff_takes_the_delta_against_the_version_it_started_from():
    """And the staleness from the download: computed here from the event log."""
    world = World([FakeSite("a", 1.0, step_s=1.0), FakeSite("b", -3.0, step_s=3.3)])
    found = as_numpy(world.serve(lambda: FedBuff(buffer_size=2)).arrays)
    target = {"a": 1.0, "b": -3.0}
    versions = [as_numpy(initial_arrays())]
    buffer: list[tuple[float, dict[str, np.ndarray]]] = []
    for done in (e for e in world.events("order_done") if e["kind"] == "train"):
        if len(versions) > ROUNDS:
            break
        base = versions[done["version"]]
        trained = pull_towards(target[done["facility"]])(base, 10)
        weight = (1 + len(versions) - 1 - done["version"]) ** -0.5
        buffer.append((weight, {k: base[k] - trained[k] for k in base}))
        if len(buffer) == 2:
            new = {k: v - sum(w * d[k] for w, d in buffer) / 2 for k, v in versions[-1].items()}
            versions, buffer = [*versions, new], []
    assert any(max(e["staleness"].values()) > 0 for e in world.events("aggregated"))
    for name, tensor in versions[-1].items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [DiLoCo, lambda: FedBuff(buffer_size=2)])
def test_checkpoints_do_not_grow(make):
    """Only what is needed is kept: the store's size does not grow with the rounds."""
    world = World(sites())
    world.serve(make)
    state = world.checkpoints.restore()
    assert state is not None
    assert len(state["tensors"]) <= 4


def test_start_under_plain_flower_needs_no_surroundings():
    """Our strategies run as any other: Strategy(...).start(grid, arrays)."""
    grid, arrays = plain_grid()
    strategy = DiLoCo()
    strategy.runtime = Runtime(clock=grid.clock)  # virtual time is all that is special
    result = strategy.start(grid, arrays, num_rounds=2, train_config=ConfigRecord({"steps": 2}))
    assert set(result.train_metrics_clientapp) == {1, 2}
    assert result.evaluate_metrics_clientapp[2]
