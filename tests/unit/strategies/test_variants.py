"""Options that reproduce well-known implementations, against numbers computed by hand.

The first weight is 10 at the start; sites move it by `move`. "APPFL" is what its aggregators
compute, with alpha 0.9 and two clients.
"""

from __future__ import annotations

import numpy as np
import pytest
from worlds.strategies.driven import Driven, record

from strategies.async_diloco import AsyncDiLoCo
from strategies.base.asynchronous import AsyncStrategy
from strategies.decoupled_diloco import DecoupledDiLoCo
from strategies.diloco import DiLoCo
from strategies.engine.runtime import Runtime
from strategies.fedasync import FedAsync
from strategies.fedbuff import FedBuff
from strategies.streaming_diloco import StreamingDiLoCo

APPFL = {"outer_lr": 0.9, "divide_by": "sites"}


def move(by: float) -> dict[str, np.ndarray]:
    return {"w": np.full((2, 2), by), "b": np.full(1, by)}


def first(run: Driven) -> float:
    return float(run.now["w"][0, 0])


def two_from_the_start(strategy: AsyncStrategy) -> list[float]:
    """Sites a and b start together and move by 2 and 4; return the weight after each."""
    run, seen = Driven(strategy, sites="ab"), []
    run.ask("a"), run.ask("b")
    for name, by, examples in (("a", 2.0, 10), ("b", 4.0, 30)):
        run.arrive(name, move(by), examples=examples)
        seen.append(first(run))
    return seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [8.2, 6.22]),
        ({"share": "uniform"}, [9.1, 7.705]),
        ({"share": "uniform", "moves": "difference"}, [9.1, 7.3]),
        ({"share": "uniform", "staleness": "polynomial"}, [9.1, 8.113586]),
        ({"share": "uniform", "staleness": "polynomial", "moves": "difference"}, [9.1, 7.827208]),
        # n_a = 10 alone: 1/2 of two average sites; then n_b = 30 of 40.
        ({"share": "num-examples", "moves": "difference"}, [9.1, 9.1 - 0.9 * 0.75 * 4.0]),
    ],
)
def test_fedasync(options, expected):
    """The paper's mixing weight, and APPFL's that is divided among the clients."""
    strategy = FedAsync(**({"alpha": 0.9, "staleness": "constant"} | options))
    assert two_from_the_start(strategy) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"outer_lr": 1.0}, [7.0, 4.585786]),
        (APPFL, [7.3, 5.127208]),
        ({**APPFL, "moves": "model"}, [7.3, 5.986343]),
    ],
)
def test_fedbuff(options, expected):
    """A flush of two fresh updates, then one of a stale and a fresh one."""
    run = Driven(FedBuff(buffer_size=2, **options))
    for name in "abc":
        run.ask(name)
    run.strategy.num_sites = 2  # it is gone, and its update on the way
    run.arrive("a", move(2.0)), run.arrive("b", move(4.0))
    seen = [first(run)]
    run.ask("a")
    run.arrive("c", move(4.0)), run.arrive("a", move(2.0))
    assert [*seen, first(run)] == pytest.approx(expected, rel=1e-6)


def test_fedbuff_by_examples():
    """A site of three times the examples has three times the weight."""
    run = Driven(FedBuff(buffer_size=2, outer_lr=0.9, divide_by="num-examples"), sites="ab")
    run.ask("a"), run.ask("b")
    run.arrive("a", move(2.0), examples=10), run.arrive("b", move(4.0), examples=30)
    assert first(run) == pytest.approx(10.0 - 0.9 * (0.25 * 2.0 + 0.75 * 4.0))


MOMENTA = [
    ({"nesterov": True, "outer_lr": 0.7, "momentum": 0.9}, [8.67, 6.773]),
    ({"nesterov": False, "outer_lr": 0.7, "momentum": 0.9}, [9.3, 7.97]),
    ({"nesterov": False, "outer_lr": 1.0, "momentum": 0.9}, [9.0, 7.1]),  # APPFL's FedAvgM
    ({"nesterov": False, "outer_lr": 0.7, "momentum": 0.0}, [9.3, 8.6]),
    ({"nesterov": True, "outer_lr": 0.7, "momentum": 0.0}, [9.3, 8.6]),
]


@pytest.mark.parametrize(("options", "expected"), MOMENTA)
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: AsyncDiLoCo(delay=1, **o),
        lambda **o: DecoupledDiLoCo(grace_s=0.0, **o),
        lambda **o: StreamingDiLoCo(fragments=1, alpha=0.0, **o),
    ],
    ids=["async", "decoupled", "streaming"],
)
def test_outer_momentum_of_one_site(make, options, expected):
    """Two steps along a pseudo-gradient of 1, with plain and with Nesterov's momentum."""
    run, seen = Driven(make(**options), sites="a"), []
    for _ in range(2):
        plan = run.ask("a")
        if plan.bind is not None:
            order = run.orders["a"][0]
            order.options.update(plan.bind(None).options)
        run.arrive("a", move(1.0))
        run.at(run.clock.t)
        seen.append(first(run))
    assert seen == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("options", "expected"), MOMENTA)
def test_outer_momentum_in_rounds(options, expected):
    """The same for DiLoCo."""
    strategy, seen = DiLoCo(**options), []
    strategy.runtime, strategy.arrays = Runtime(), record(move(10.0))
    for k in range(2):
        trained = record(move(float(strategy.arrays["b"].numpy()[0]) - 1.0))
        strategy.arrays = record(dict(strategy.aggregate(k + 1, [trained], [1.0])))
        seen.append(float(strategy.arrays["b"].numpy()[0]))
    assert seen == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_delayed_momentum_adds_up(nesterov):
    """Asynchronous DiLoCo with N = 2: two results make the step of their mean."""
    run = Driven(AsyncDiLoCo(nesterov=nesterov), sites="ab")
    theta, m = 10.0, 0.0
    for _ in range(3):
        run.ask("a"), run.ask("b")
        run.arrive("a", move(1.0)), run.arrive("b", move(3.0))
        m = 0.9 * m + 2.0
        theta -= 0.7 * ((2.0 + 0.9 * m) if nesterov else m)
        assert first(run) == pytest.approx(theta, rel=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAsync(share="half"),
        lambda: FedAsync(moves="weights"),
        lambda: FedBuff(divide_by="k"),
        lambda: FedBuff(moves="weights"),
    ],
)
def test_other_words_are_refused(make):
    """At once, with the valid ones."""
    with pytest.raises(ValueError, match=r"is not known\. Valid: "):
        make()
