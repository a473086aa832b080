"""What every asynchronous and windowed strategy may be given: an average, and sized orders."""

from __future__ import annotations

import numpy as np
import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf
from worlds.strategies.driven import Driven, close, delta, theta
from worlds.strategies.grid import FakeSite
from worlds.strategies.toy_model import as_numpy
from worlds.strategies.world import ARGUMENTS, CONF, World, configured, sites

from strategies import AsyncStrategy
from strategies.async_diloco import AsyncDiLoCo
from strategies.fedasync import FedAsync
from strategies.fedavg import FedAvg
from strategies.fedbuff import FedBuff
from strategies.lora.fedex_lora import FedExLora
from strategies.scaffold import Scaffold


def asynchronous() -> list[str]:
    """Return the files of `conf/strategy` whose class is one of ours with an event for each.

    But those of adapters: an average of their versions is no version, and they refuse to make one.
    """
    targets = {p.stem: str(OmegaConf.load(p)["_target_"]) for p in sorted(CONF.glob("*.yaml"))}
    ours = [n for n, target in targets.items() if issubclass(get_class(target), AsyncStrategy)]
    return [name for name in ours if not issubclass(get_class(targets[name]), FedExLora)]


def move(by: float) -> dict[str, np.ndarray]:
    return {"w": np.full((2, 2), by), "b": np.full(1, by)}


def test_the_average_by_hand():
    """c = (1 + gamma) rho / (t + gamma), a version being half a round of two sites."""
    run = Driven(FedBuff(buffer_size=1, average=8.0), sites="ab")
    seen = []
    for name, by in (("a", 2.0), ("b", 4.0)):
        run.ask(name)
        run.arrive(name, move(by))
        seen.append(float(run.strategy.published()["w"].numpy()[0, 0]))
    first = 10.0 - 4.5 / 8.5 * 2.0  # of 10 and 8
    assert seen == pytest.approx([first, (first + 4.0) / 2])  # and 4, by 4.5 / 9
    assert float(run.now["w"][0, 0]) == 4.0


def test_a_version_weighs_by_the_updates_in_it():
    """A buffer of two from two sites is a round: gamma 0 makes the mean of the versions."""
    run = Driven(FedBuff(buffer_size=2, average=0.0), sites="ab")
    versions = []
    for _ in range(3):
        run.ask("a"), run.ask("b")
        run.arrive("a", delta(1.0)), run.arrive("b", delta(2.0))
        versions.append(run.now)
    close(
        {k: a.numpy() for k, a in run.strategy.published().items()},
        {k: np.mean([v[k] for v in versions], axis=0) for k in theta()},
    )


@pytest.mark.parametrize("name", asynchronous())
def test_every_strategy_publishes_an_average(name):
    """`average` is an option of each, and the last version of its run is the average."""
    chosen = configured(name).args[0]
    world, made = World(sites()), []

    def make():
        made.append(configured(name)(average=2.0))
        return made[-1]

    result = as_numpy(world.serve(make).arrays)
    mean = as_numpy(made[0].published())
    newest = as_numpy(World(sites()).serve(lambda: configured(name)(average=None)).arrays)
    for key, tensor in result.items():
        np.testing.assert_array_equal(tensor, mean[key].astype(tensor.dtype))
    assert any(not np.array_equal(result[key], newest[key]) for key in result), chosen


@pytest.mark.parametrize("make", [FedAsync, FedBuff, AsyncDiLoCo, FedAvg, Scaffold])
def test_orders_are_sized_to_speed(make):
    """The smallest until a site's speed is known; then `round_s` of training, within bounds."""
    run = Driven(make(size_steps=True, round_s=60.0, min_steps=7, max_steps=40), sites="ab")
    for name in "ab":
        assert run.ask(name).steps == 7
    run.arrive("a", delta(1.0), step_s=2.0), run.arrive("b", delta(1.0), step_s=0.5)
    assert [run.ask(name).steps for name in "ab"] == [30, 40]


@pytest.mark.parametrize("make", [FedAsync, FedBuff, FedAvg])
def test_without_the_options_nothing_changes(make):
    """Orders have the configured steps, and the newest version is what is published."""
    run = Driven(make(), sites="ab")
    for _ in range(2):
        for name in "ab":
            assert not run.ask(name).steps
        run.arrive("a", delta(1.0), step_s=2.0), run.arrive("b", delta(1.0))
    assert run.strategy.published() is run.strategy.arrays
    assert not run.save()["fields"]["pace"]["fields"]["step_s"]


def test_a_sized_order_fits_what_is_left_of_the_walltime():
    """Over a grid: a site eight times as fast does about eight times the steps per order."""
    two = [FakeSite("fast", 1.0, step_s=0.5), FakeSite("slow", -1.0, step_s=4.0)]
    world = World(two, rounds=12)
    world.serve(lambda: FedBuff(buffer_size=2, size_steps=True, round_s=40.0, min_steps=5))
    steps = {name: [e["steps"] for e in world.arrived(name)] for name in ("fast", "slow")}
    assert steps["fast"][-1] == pytest.approx(8 * steps["slow"][-1], rel=0.3)


def test_the_rows_of_the_contract_suite_are_there():
    """A strategy is a row of the contract suite by its file alone."""
    assert set(ARGUMENTS) <= {p.stem for p in CONF.glob("*.yaml")}
