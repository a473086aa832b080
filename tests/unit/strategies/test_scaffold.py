"""SCAFFOLD's control variates, against hand computations."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from worlds.strategies.driven import Driven, close, delta, minus, theta
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import as_numpy, initial_arrays
from worlds.strategies.world import Killed, World, sites

from flwr_hpc.protocol import CORRECTION, GRADIENT, ORDER, Order, from_json
from strategies import Plan, Runtime
from strategies.fedavg import FedAvg
from strategies.scaffold import Scaffold

Tensors = dict[str, np.ndarray]


def correction(plan: Plan | None) -> Tensors | None:
    """What an order would carry, made as late as it is handed in."""
    assert plan is not None
    assert plan.options["mean-gradient"]
    made = plan.extra_arrays[CORRECTION]()
    return None if made is None else dict(made)


def mean(*terms: Tensors) -> Tensors:
    return {k: sum(t[k] for t in terms) / len(terms) for k in terms[0]}


def less(a: Tensors, b: Tensors) -> Tensors:
    return {k: a[k] - b[k] for k in a}


def test_two_rounds_by_hand():
    """theta - eta_g mean delta; the second orders carry c - c_i, c the mean of the c_i."""
    run = Driven(Scaffold(outer_lr=0.5), sites="ab")
    g = {"a": delta(1.0), "b": delta(3.0, turn=1.0)}
    assert [correction(run.ask(name)) for name in "ab"] == [None, None]
    assert not run.arrive("a", delta(2.0), gradient=g["a"])
    assert run.arrive("b", delta(4.0), gradient=g["b"], steps=10)  # cut short: a mean all the same
    first = minus(theta(), (0.25, delta(2.0)), (0.25, delta(4.0)))
    close(run.now, first)
    c = mean(*g.values())
    for name in "ab":
        close(correction(run.ask(name)), less(c, g[name]))
    newer = delta(-7.0, turn=2.0)
    run.arrive("a", delta(1.0), gradient=newer)
    assert run.arrive("b", delta(1.0), gradient=g["b"])
    close(run.now, minus(first, (0.5, delta(1.0))))
    # c + (c_a+ - c_a) / N
    expected = {k: c[k] + (newer[k] - g["a"][k]) / 2 for k in c}
    close(correction(run.ask("a")), less(expected, newer))


def test_a_correction_is_that_of_the_version():
    """c is fixed within a round, whenever in it a site gets its allocation."""
    run = Driven(Scaffold(), sites="ab")
    for name, size in (("a", 1.0), ("b", 3.0)):
        run.ask(name)
        run.arrive(name, delta(1.0), gradient=delta(size))
    plan = run.ask("b")
    run.ask("a")
    run.arrive("a", delta(1.0), gradient=delta(50.0))
    close(correction(plan), delta(2.0 - 3.0))


def test_an_empty_result_leaves_the_variate():
    """It knows no gradient; nor does a site whose software is older."""
    run = Driven(Scaffold(), sites="ab")
    for name, size in (("a", 1.0), ("b", 3.0)):
        run.ask(name)
        run.arrive(name, delta(1.0), gradient=delta(size))
    run.ask("a")
    run.ask("b")
    run.arrive("a", delta(0.0), gradient=delta(99.0), steps=0)
    assert run.arrive("b", delta(1.0))
    close(correction(run.ask("a")), delta(2.0 - 1.0))
    close(correction(run.ask("b")), delta(2.0 - 3.0))


def test_a_site_that_joins_counts_from_its_first_report_on():
    """N grows then; until then it trains as in FedAvg, and moves nobody's optimum."""
    run = Driven(Scaffold(), sites="ab")
    run.ask("a")
    run.arrive("a", delta(1.0), gradient=delta(1.0))
    run.ask("a")
    assert correction(run.ask("b")) is None
    run.arrive("a", delta(1.0), gradient=delta(1.0))
    run.arrive("b", delta(1.0), gradient=delta(5.0))
    close(correction(run.ask("b")), delta(3.0 - 5.0))


def test_a_site_that_is_gone_is_forgotten():
    """Its variate would pull at the others for ever."""
    run = Driven(Scaffold(forget_after=1), sites="ab")
    run.ask("a")
    run.ask("b")
    run.arrive("a", delta(1.0), gradient=delta(1.0))
    run.arrive("b", delta(1.0), gradient=delta(3.0))
    for expected in (2.0, 1.0):
        close(correction(run.ask("a")), delta(expected - 1.0))
        run.arrive("a", delta(1.0), gradient=delta(1.0))
    assert set(run.strategy.variates) == {"a"}
    assert correction(run.ask("b")) is None


def test_variates_weigh_what_updates_weigh():
    """c = sum n_i / n c_i: where theta rests, the weighted mean of the gradients is zero."""
    run = Driven(Scaffold(weighted_by="num-examples"), sites="ab")
    for name, size, examples in (("a", 1.0, 10), ("b", 3.0, 30)):
        run.ask(name)
        run.arrive(name, delta(1.0), gradient=delta(size), examples=examples)
    close(correction(run.ask("a")), delta(2.5 - 1.0))


# ---- what it is for -----------------------------------------------------------------------------

CURVED = {"a": (1.0, 20.0), "b": (8.0, 2.0), "c": (3.0, -4.0)}  # h and t of h / 2 (w - t)^2


def descend(at: Tensors, name: str, shift: Tensors | None, steps: int, lr: float) -> Any:
    """Plain gradient descent of a site; returns how it moved and its mean gradient."""
    h, t = CURVED[name]
    w, total = {k: v.astype(float) for k, v in at.items()}, {k: 0.0 * v for k, v in at.items()}
    for _ in range(steps):
        for k in w:
            g = h * (w[k] - t)
            total[k] = total[k] + g / steps
            w[k] = w[k] - lr * (g + (0.0 if shift is None else shift[k]))
    return less(at, w), total


def after(strategy: FedAvg, rounds: int, steps: int = 40) -> Tensors:
    run = Driven(strategy, sites=CURVED)
    for _ in range(rounds):
        plans = {name: run.ask(name) for name in CURVED}
        for name, plan in plans.items():
            make = plan.extra_arrays.get(CORRECTION)
            shift = dict(make() or {}) if make else {}
            moved, g = descend(run.now, name, shift or None, steps, lr=0.02)
            run.arrive(name, moved, gradient=g)
    return run.now


def test_without_variates_it_is_fedavg():
    """The first round of both is the same."""
    close(after(Scaffold(), 1), after(FedAvg(weighted_by="uniform"), 1))


def test_the_mean_gradient_is_the_papers_option_two():
    """c_i+ = c_i - c + (x - y) / (K eta), for plain gradient descent."""
    shift = {k: np.full_like(v, 0.7) for k, v in theta().items()}
    moved, g = descend(theta(), "b", shift, 25, lr=0.02)
    close(g, {k: moved[k] / (25 * 0.02) - shift[k] for k in g})


def test_it_reaches_the_joint_optimum_where_fedavg_does_not():
    """Sites of unequal curvature, many local steps: the drift that SCAFFOLD is made against."""
    best = sum(h * t for h, t in CURVED.values()) / sum(h for h, _ in CURVED.values())
    for name, w in after(Scaffold(), 60).items():
        np.testing.assert_allclose(w, best, rtol=1e-3, err_msg=name)
    for w in after(FedAvg(weighted_by="uniform"), 60).values():
        assert (np.abs(w - best) > 1.0).all()


# ---- what is sent -------------------------------------------------------------------------------


def test_an_order_that_is_sent_again_carries_the_same():
    """Wherever the server dies: the correction belongs to the order. Late reports included."""

    def make() -> Scaffold:
        return Scaffold(quorum=2, grace_s=0.0)

    whole = World(sites())
    expected = as_numpy(whole.serve(make).arrays)
    assert any(max(e["staleness"].values()) > 0 for e in whole.events("aggregated"))
    carried: dict[str, set[bytes]] = defaultdict(set)
    for k in range(0, whole.moments, 7):
        world = World(sites())
        with pytest.raises(Killed):
            world.serve(make, die_at=k)
        found = as_numpy(world.serve(make).arrays)
        assert all((found[name] == tensor).all() for name, tensor in expected.items())
        for message in (m for m in world.grid.pushed if m.metadata.message_type == "train"):
            order = from_json(Order, str(message.content[ORDER]["json"]))
            tensors = as_numpy(message.content.get(CORRECTION, {}))
            assert order.extra_arrays == ([CORRECTION] if tensors else [])
            carried[order.id].add(b"".join(t.tobytes() for t in tensors.values()))
    assert {len(found) for found in carried.values()} == {1}
    assert any(b"" not in found for found in carried.values())


def test_ordinary_client_apps_train_as_in_fedavg():
    """They are sent no correction, nor an option that they do not know."""
    grid = FakeGrid([FakeSite("x", 1.0, plain=True), FakeSite("y", 3.0, plain=True)])
    results = []
    for strategy in (Scaffold(), FedAvg(weighted_by="uniform")):
        strategy.runtime = Runtime(clock=grid.clock)
        config = ConfigRecord({"steps": 3})
        results.append(strategy.start(grid, initial_arrays(), 2, train_config=config))
    close(*(as_numpy(result.arrays) for result in results))
    sent = [m.content for m in grid.pushed if m.metadata.message_type == "train"]
    assert all(CORRECTION not in content for content in sent)
    assert all("mean-gradient" not in content["config"] for content in sent)


def test_a_gradient_that_is_no_number_is_refused():
    """It would spoil every later order of every site."""

    def spoil(content: RecordDict) -> None:
        arrays = content[GRADIENT].items()
        bad = {k: Array(a.numpy() * np.float32("inf")) for k, a in arrays}
        content[GRADIENT] = ArrayRecord(bad)

    world = World([*sites(), FakeSite("n", step_s=2.0, spoil=spoil)])
    world.serve(Scaffold)
    assert world.events("order_rejected")
    assert all("n" not in e["facilities"] for e in world.events("aggregated"))
