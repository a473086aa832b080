"""The asynchronous strategies against hand computations in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord
from worlds.strategies.driven import Driven, close, delta, minus, record, theta
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import as_numpy, initial_arrays

from strategies import Runtime
from strategies.async_diloco import AsyncDiLoCo
from strategies.engine import loop
from strategies.engine.runtime import MemoryCheckpoints
from strategies.fedasync import FedAsync
from strategies.fedbackfill import FedBackfill
from strategies.fedbuff import FedBuff
from strategies.parts import rules
from strategies.parts.outer import OuterSGD


def mixed(theta, trained, alpha):
    return {k: (1 - alpha) * v + alpha * trained[k] for k, v in theta.items()}


# ---- FedAsync -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "s"),
    [
        ({}, lambda tau: (1 + tau) ** -0.5),
        ({"a": 1.0}, lambda tau: 1 / (1 + tau)),
        ({"staleness": "hinge", "b": 0.0}, lambda tau: 1 if tau <= 0 else 1 / (10 * tau + 1)),
        ({"staleness": "constant"}, lambda tau: 1.0),
    ],
)
def test_fedasync_by_hand(arguments, s):
    """Three arrivals that started from one version: each is mixed in the less the staler it is."""
    run, here = Driven(FedAsync(alpha=0.6, **arguments)), theta()
    for name in "abc":
        run.ask(name)
    for tau, name in enumerate("abc"):
        moved = delta(tau + 1.0, turn=tau)
        assert run.arrive(name, moved)
        here = mixed(here, minus(theta(), (1.0, moved)), 0.6 * s(tau))
    close(run.now, here)


def test_fedasync_defaults_are_the_papers():
    """alpha 0.9; hinge a = 10, b = 4."""
    strategy = FedAsync(staleness="hinge")
    assert strategy.alpha == 0.9
    assert [strategy.staleness_weight(tau) for tau in (4, 5)] == [1.0, pytest.approx(1 / 11)]


@pytest.mark.parametrize(
    "arguments",
    [{"alpha": 0.0}, {"alpha": 1.5}, {"staleness": "x"}, {"a": 1, "staleness": "constant"}],
)
def test_fedasync_refuses_nonsense(arguments):
    """At once, and not with the first arrival hours later."""
    with pytest.raises((ValueError, TypeError)):
        FedAsync(**arguments)


# ---- asynchronous DiLoCo ------------------------------------------------------------------------


def test_async_diloco_with_a_delay_of_one_is_nesterov():
    """N = 1: bit for bit the outer step of DiLoCo, over several arrivals."""
    run, outer, store = Driven(AsyncDiLoCo(delay=1)), OuterSGD(0.7, 0.9), MemoryCheckpoints()
    here = record(theta())
    for k in range(4):
        run.ask("a")
        base = here
        trained = {n: base[n].numpy() - np.float32(d) for n, d in delta(1.0 + k, turn=k).items()}
        trained = record(trained)
        deltas = dict(rules.record_delta(base, trained))
        here = store.put(f"g{k}", outer.step(run.strategy.keep_tensors, here, deltas.__getitem__))
        assert run.arrive("a", delta(1.0 + k, turn=k))
    close(run.now, {n: a.numpy() for n, a in here.items()})


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_async_diloco_by_hand(exponent):
    """N = 3: every arrival steps by eta delta / N, the momentum's part comes every third time."""
    run = Driven(AsyncDiLoCo(outer_lr=0.7, momentum=0.9, staleness_exponent=exponent))
    here = theta()
    m = {k: np.zeros_like(v) for k, v in here.items()}
    total = {k: np.zeros_like(v) for k, v in here.items()}
    started: dict[str, int] = {}
    for n, name in enumerate("abcaabbcc"):
        for free in "abc":
            if free not in run.orders:
                run.ask(free)
                started[free] = run.strategy.version
        s = (1.0 + run.strategy.version - started[name]) ** -exponent
        d = delta(1.0 + n, turn=0.5 * n)
        assert run.arrive(name, d)
        here = minus(here, (0.7 * s / 3, d))
        total = {k: total[k] + s * d[k] for k in d}
        if n % 3 == 2:
            m = {k: 0.9 * m[k] + total[k] / 3 for k in m}
            here = minus(here, (0.7 * 0.9, m))
            total = {k: np.zeros_like(v) for k, v in total.items()}
    close(run.now, here)
    (momentum,) = run.save()["tensors"]  # the sum is empty again
    assert momentum.startswith("momentum-")


def test_dynamic_steps():
    """H_k = max(1, floor(v_k / v_max H)), with H until a site's speed is known."""
    run = Driven(AsyncDiLoCo(steps=50))
    assert [run.ask(n).steps for n in "abc"] == [50, 50, 50]
    for name, step_s in (("a", 1.0), ("b", 3.0), ("c", 1000.0)):
        run.arrive(name, delta(0.1), step_s=step_s)
    assert [run.ask(n).steps for n in "abc"] == [50, 16, 1]
    assert Driven(AsyncDiLoCo(), steps=40).ask("a").steps == 40


def test_fixed_steps():
    """dynamic_steps=False: every order has H steps."""
    run = Driven(AsyncDiLoCo(dynamic_steps=False, steps=7))
    for name, step_s in (("a", 1.0), ("b", 3.0)):
        assert run.ask(name).steps == 7
        run.arrive(name, delta(0.1), step_s=step_s)
        assert run.ask(name).steps == 7


def test_fedbuff_counts_no_empty_order():
    """Else it would fill the buffer and shorten the step."""
    run = Driven(FedBuff(buffer_size=2), "ab")
    for steps in (0, 10, 10):
        run.ask("a")
        run.arrive("a", delta(float(steps)), steps=steps)
    assert run.strategy.version == 1
    close(run.now, minus(theta(), (1.0, delta(10.0))))


def test_fedbuff_debiased_by_hand():
    """A site's weight is divided by its share of the arrivals, relative to 1/N; plain is not."""
    plain, debiased = (Driven(FedBuff(buffer_size=3, debias=on), "ab") for on in (False, True))
    for run in (plain, debiased):
        for name in "aab":
            run.ask(name)
            run.arrive(name, delta(1.0))
    close(plain.now, minus(theta(), (1.0, delta(1.0))))
    share, total = {"a": 0.5}, 0.0
    for name in "aab":
        share.setdefault(name, 0.5)
        share = {n: 15 / 16 * f + 1 / 16 * (n == name) for n, f in share.items()}
        total += 0.5 / share[name]
    close(debiased.now, minus(theta(), (total / 3, delta(1.0))))


# ---- FedBackfill --------------------------------------------------------------------------------


def test_fedbackfill_by_hand():
    """theta - eta g_k s(tau) delta_k: g and s recomputed here from the arrivals."""
    balanced = {"balance": True, "balance_arrivals": True}
    run = Driven(FedBackfill(outer_lr=0.9, momentum=0.0, **balanced))
    here, steps, share = theta(), {}, {}
    started: dict[str, int] = {}
    for k, (name, done) in enumerate([("a", 80), ("a", 60), ("b", 10), ("a", 80), ("c", 20)]):
        for free in "abc":
            if free not in run.orders:
                run.ask(free)
                started[free] = run.strategy.version
        steps[name] = 0.7 * steps[name] + 0.3 * done if name in steps else float(done)
        share.setdefault(name, 1 / 3)
        share = {n: (1 - 1 / 24) * f + 1 / 24 * (n == name) for n, f in share.items()}
        g = 1 / 3 * math.sqrt(np.mean(list(steps.values())) / steps[name])
        g *= min(3.0, max(1 / 3, (1 / 3) / share[name]))
        s = (1 + (run.strategy.version - started[name]) / 3) ** -0.5
        d = delta(1.0 + k, turn=k)
        assert run.arrive(name, d, steps=done)
        here = minus(here, (0.9 * g * s, d))
    close(run.now, here)


def test_fedbackfill_scales_momentum_by_participation():
    """m <- beta^rho m + rho delta, theta <- theta - eta rho (delta + beta m)."""
    run = Driven(FedBackfill(outer_lr=2.0, momentum=0.8))
    here, m = theta(), dict.fromkeys(theta(), 0.0)
    for k, name in enumerate("abcab"):
        run.ask(name)  # no staleness: rho is 1/3
        d = delta(1.0 + k, turn=k)
        run.arrive(name, d)
        m = {key: 0.8 ** (1 / 3) * m[key] + d[key] / 3 for key in m}
        here = minus(here, (2.0 / 3, d), (2.0 * 0.8 / 3, m))
    close(run.now, here)


def test_fedbackfill_of_one_site_is_nesterov():
    """rho = 1: the participation-scaled momentum is DiLoCo's outer step."""
    run = Driven(FedBackfill(outer_lr=0.7, momentum=0.9), "a")
    here, m = theta(), dict.fromkeys(theta(), 0.0)
    for k in range(4):
        run.ask("a")
        d = delta(1.0 + k, turn=k)
        run.arrive("a", d)
        m = {name: 0.9 * m[name] + d[name] for name in m}
        here = minus(here, (0.7, d), (0.7 * 0.9, m))
    close(run.now, here)


def test_fedbackfill_publishes_an_average():
    """(1 - c) mean + c theta, c = (1 + gamma) rho / (t + gamma); the last version is the mean."""
    run = Driven(FedBackfill(outer_lr=0.7, momentum=0.9, average=4.0), "a")
    mean = theta()
    for k in range(5):
        run.ask("a")
        run.arrive("a", delta(1.0 + k, turn=k))
        c = 5.0 / (k + 1 + 4.0)
        mean = {name: (1 - c) * mean[name] + c * run.now[name] for name in mean}
        published = {name: a.numpy() for name, a in run.strategy.published().items()}
        close(published, mean)
    plain = Driven(FedBackfill(average=None), "a")
    assert plain.strategy.published() is plain.strategy.arrays


def test_the_last_version_is_what_is_published():
    """In the dtypes of the others; the versions before it are what sites train on."""
    grid, strategy = FakeGrid([FakeSite("a"), FakeSite("b", 2.0)]), FedBackfill(average=1.0)
    strategy.runtime, seen = Runtime(clock=grid.clock), {}

    def look(version: int, arrays: ArrayRecord) -> None:
        seen[version] = as_numpy(arrays)

    result = strategy.start(
        grid, initial_arrays(), 6, train_config=ConfigRecord({"steps": 3}), evaluate_fn=look
    )
    mean = as_numpy(strategy.average.mean)
    for name, tensor in as_numpy(result.arrays).items():
        np.testing.assert_array_equal(tensor, mean[name].astype(tensor.dtype))
        np.testing.assert_array_equal(seen[6][name], mean[name])
        assert tensor.dtype == initial_arrays()[name].numpy().dtype


def test_fedbackfill_bound_early_trains_old_weights():
    """The ablation: what was newest when the site was asked to queue, and kept until then."""
    run = Driven(FedBackfill(late_binding=False))
    plan = run.ask("a")
    run.ask("b")
    run.arrive("b", delta(1.0))
    assert run.strategy.version == 1
    assert plan.bind is not None
    assert plan.bind(None).version == 0
    assert "global-0" in run.save()["tensors"]


def test_fedbackfill_without_balance_weighs_one_over_n():
    """The default: every update counts alike."""
    run = Driven(FedBackfill(outer_lr=1.0, momentum=0.0))
    run.ask("a")
    run.arrive("a", delta(3.0), steps=1000)
    close(run.now, minus(theta(), (1 / 3, delta(3.0))))


def test_fedbackfill_a_frequent_site_never_loses_more_than_two_thirds():
    """The factor of the arrivals is clipped to [1/3, 3]."""
    run = Driven(FedBackfill(balance_arrivals=True, momentum=0.0))
    for _ in range(200):
        run.ask("a")
        run.arrive("a", delta(0.0))
    assert run.strategy.share("a") == pytest.approx(1 / 3 * 1 / 3, rel=0.01)
    run.ask("b")
    run.arrive("b", delta(0.0))
    assert run.strategy.share("b") <= 1.0 + 1e-9


def sized(**arguments) -> Driven:
    """Site a trains a step in 2 s; an order of its costs 30 s besides."""
    run = Driven(FedBackfill(**arguments))
    run.ask("a")
    run.at(50.0)
    run.arrive("a", delta(0.0), step_s=2.0)  # 10 steps of 2 s in 50 s
    return run


def test_fedbackfill_sizes_an_order_by_its_cost():
    """Five times what an order costs besides: 150 s, 75 steps; or `round_s`; within the bounds."""
    assert Driven(FedBackfill()).ask("a").steps == 10  # nothing is known yet
    assert sized().ask("a").steps == 75
    assert sized(round_s=60.0).ask("a").steps == 30
    assert sized(round_s=1.0).ask("a").steps == 10
    assert sized(max_steps=50).ask("a").steps == 50
    assert sized(size_steps=False).ask("a").steps == 0  # as configured


@pytest.mark.parametrize(
    ("left_s", "steps"),
    [
        (10_000, 75),  # room enough
        (30 + 75 * 2 * 1.2, 84),  # the last order is stretched to the end: 180 / (1.06 * 2)
        (130, 47),  # cut to what is left: 100 / (1.06 * 2)
        (31, 5),  # below that an order is not worth its transfer
    ],
)
def test_fedbackfill_fits_an_order_into_the_walltime(left_s, steps):
    """Not the round bounds the work but what is left of the job."""
    run = sized()
    site = run.strategy.sites["a"]
    site.warm, site.ends_at = True, run.clock.now() + left_s
    assert run.ask("a").steps == steps
    del run.orders["a"]
    site.warm = False  # the walltime of a job that has ended says nothing
    assert run.ask("a").steps == 75


# ---- all of them --------------------------------------------------------------------------------


def test_the_metrics_of_old_versions_are_forgotten(monkeypatch):
    """Else every checkpoint of a long run would be as long as the run."""
    monkeypatch.setattr(loop, "KEPT_METRICS", 5)
    grid, strategy = FakeGrid([FakeSite("a"), FakeSite("b")]), FedAsync()
    strategy.runtime = Runtime(clock=grid.clock)
    result = strategy.start(grid, initial_arrays(), 20, train_config=ConfigRecord({"steps": 3}))
    assert set(result.train_metrics_clientapp) == {16, 17, 18, 19, 20}
    kept = strategy.runtime.checkpoints.restore()["result"]["train_metrics_clientapp"]
    assert list(kept) == ["16", "17", "18", "19", "20"]


ASYNC = [FedAsync, AsyncDiLoCo, lambda: FedBackfill(), lambda: FedBuff(buffer_size=1)]


@pytest.mark.parametrize("make", ASYNC)
def test_an_order_that_trained_nothing_changes_nothing(make):
    """A job that died in its first step must not pull the model back to an old version."""
    run = Driven(make())
    run.ask("a"), run.ask("b")
    run.arrive("a", delta(5.0))
    before = run.now
    run.arrive("b", delta(0.0), steps=0)
    close(run.now, before)
