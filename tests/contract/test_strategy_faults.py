"""What every strategy must stand of its sites: death, silence, lateness, lies, coming and going."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from worlds.strategies.grid import FakeSite
from worlds.strategies.toy_model import as_numpy, with_nan
from worlds.strategies.world import World, each, ends_well, long, sites

from flwr_hpc.protocol import ARRAYS, GRADIENT, METRICS, STATUS, TRAIN, WEIGHT_KEY, Status
from strategies import AsyncStrategy, RunFailed, Settings

# ---- silence ------------------------------------------------------------------------------------


@each
def test_a_dead_site_does_not_block(make):
    """It dies in its first order and never comes back: the others make all versions."""
    world = World(sites(), Settings(offline_grace_s=15.0))
    world.grid.away("b", 20.0)
    ends_well(world, make)
    assert world.merged("b") == []
    assert world.events("order_failed")


@each
def test_a_window_without_arrivals(make):
    """The queues outlast the first deadline of whoever has one: it sets another.

    The site that made the initial weights is gone, and only a deadline ends a window it is in.
    """
    slow = [FakeSite(n, 1.0, queue_s=300.0 + k, step_s=1.0 + k) for k, n in enumerate("abc")]
    settings = Settings(round_deadline_s=200.0, offline_grace_s=5000.0)
    world = World([*slow, FakeSite("first")], settings)
    world.grid.away("first", 2.5)
    ends_well(world, make, failed_rounds=True)
    versions, strategy = world.events("aggregated"), make()
    assert versions[0]["at"] > 300.0
    if not isinstance(strategy, AsyncStrategy) or getattr(strategy, "deadline_s", None):
        assert versions[-1]["at"] < 5000.0


@each
def test_a_site_that_never_starts(make):
    """Its queue outlasts the run: the deadline leaves it out, and cancels its job."""
    never, settings = FakeSite("q", queue_s=1e7), Settings(acquire_deadline_s=90.0)
    world = World([*sites(), never], settings, long(make))
    ends_well(world, make)
    assert world.merged("q") == []
    given_up = [e for e in world.events("order_failed") if e["facility"] == "q"]
    assert bool(never.cancelled) == bool(given_up)


@each
def test_a_site_whose_jobs_are_cancelled(make):
    """Each cancelled job costs what it trained, and the order goes to the next one."""
    world = World(sites())
    world.sites[1].cancels = 2
    ends_well(world, make)
    assert world.sites[1].cancels == 0
    assert len([e for e in world.events("order_failed") if e["facility"] == "b"]) == 2


@each
def test_a_site_that_always_fails(make):
    """The others go on without it."""
    broken = FakeSite("x", fail=Status("failed", error="its job was cancelled"))
    world = World([*sites(), broken])
    ends_well(world, make)
    assert world.merged("x") == []
    assert world.events("order_failed")


@each
def test_every_site_fails(make):
    """The run ends and says why."""
    broken = [FakeSite(n, fail=Status("failed", error="quota exceeded")) for n in "ab"]
    with pytest.raises(RunFailed, match="quota exceeded"):
        World(broken).serve(make)


@each
def test_every_site_is_gone(make):
    """The run ends after its grace and names them all; nobody waits for ever."""
    world = World(sites(), Settings(offline_grace_s=60.0), rounds=10**4)
    for name in "abc":
        world.grid.away(name, 100.0)
    with pytest.raises(RunFailed, match=r"a: .*offline.*b: .*offline.*c: .*offline"):
        world.serve(make)
    assert world.grid.clock.now() < 300.0


# ---- lateness -----------------------------------------------------------------------------------


@each
def test_late_replies(make):
    """One site takes longer than a window: its update counts in a later one, or never."""
    late = FakeSite("late", -2.0, step_s=16.0)
    world = World([*sites(), late], Settings(round_deadline_s=150.0), long(make))
    ends_well(world, make)
    strategy = make()
    if not isinstance(strategy, AsyncStrategy):
        assert world.merged("late") == []
        return
    assert world.arrived("late")
    if getattr(strategy, "late", "") == "drop":
        assert all(set(e["staleness"].values()) == {0} for e in world.events("aggregated"))


@each
def test_all_replies_of_a_window_are_late(make):
    """One site closes the window; then the others', all of them, come from the network's hole."""
    three = [FakeSite(n, float(k), step_s=1.0 + k) for k, n in enumerate("abc")]
    world = World(three, Settings(round_deadline_s=100.0), rounds=8)
    for name in "abc":
        world.grid.away(name, 19.0, 200.0)
    ends_well(world, make, failed_rounds=True)
    assert all(site.trained for site in world.sites)
    assert world.grid.clock.now() > 200.0


@each
def test_replies_of_forgotten_orders(make):
    """Two sites answer after their orders were given up: their weights change nothing."""
    slow = FakeSite("slow", 1e6, step_s=40.0)
    plain = FakeSite("plain", 1e6, plain=True, step_s=200.0)
    settings = Settings(order_deadline_s=160.0, wait_s=1000.0)
    world = World([*sites(), slow, plain], settings, long(make))
    weights = ends_well(world, make)
    assert (
        min(done for done, order, _ in slow.finish.values()) < world.events("aggregated")[-1]["at"]
    )
    assert world.merged("slow") == world.merged("plain") == []
    assert max(np.abs(x).max() for x in weights.values()) < 100.0


@each
def test_duplicate_replies(make):
    """Every reply twice changes no bit."""
    expected = as_numpy(World(sites()).serve(make).arrays)
    world = World(sites())
    world.grid.duplicate = True
    result = ends_well(world, make)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(result[name], tensor)


@each
def test_killed_client_apps(make):
    """Error replies of code 8 are sent again; nothing is trained twice."""
    world = World(sites())
    world.grid.errors[TRAIN] = [8] * 2
    ends_well(world, make)
    assert world.grid.errors[TRAIN] == []
    assert len(world.events("order_failed")) == 2


# ---- what a result says -------------------------------------------------------------------------


@each
def test_unequal_step_counts(make):
    """Sites that end an order early, one in its first step, count for what they did."""
    world = World(sites())
    world.sites[0].most_steps, world.sites[1].most_steps = 3, 0
    world.sites[0].queue_s = 0.0
    ends_well(world, make)
    assert {e["steps"] for e in world.arrived("a")} == {3}
    assert {e["steps"] for e in world.arrived("b")} <= {0}
    assert world.merged("b") == []  # nothing trained, nothing weighed
    assert all(e["steps"] > 3 for e in world.arrived("c"))


def _shapes(content: RecordDict) -> None:
    longer = {k: np.append(a.numpy(), np.float32(0)) for k, a in content[ARRAYS].items()}
    content[ARRAYS] = ArrayRecord({k: Array(a) for k, a in longer.items()})


def _names(content: RecordDict) -> None:
    content[ARRAYS] = ArrayRecord(dict(list(content[ARRAYS].items())[:-1]))


def _nothing(content: RecordDict) -> None:
    del content[ARRAYS]


def _no_json(content: RecordDict) -> None:
    content[STATUS] = ConfigRecord({"json": '{"state": '})


def _less_than_nothing(content: RecordDict) -> None:
    content[METRICS][WEIGHT_KEY] = -5


def _many_steps(content: RecordDict) -> None:
    """Claim more than was ordered: the weights of all sites depend on it."""
    status = json.loads(str(content[STATUS]["json"]))
    status["result"]["steps"] = 10**6
    content[STATUS] = ConfigRecord({"json": json.dumps(status)})


def _status(change: Callable[[dict[str, Any]], object]) -> Callable[[RecordDict], None]:
    """Return a spoiler of what a site says of itself."""

    def spoil(content: RecordDict) -> None:
        status = json.loads(str(content[STATUS]["json"]))
        change(status)
        content[STATUS] = ConfigRecord({"json": json.dumps(status)})

    return spoil


def _double(content: RecordDict) -> None:
    """Finite as it is sent, infinite as the model's float32."""
    tensors = as_numpy(content[ARRAYS])
    huge = {k: np.full(x.shape, 1e300) for k, x in tensors.items()}
    content[ARRAYS] = ArrayRecord({k: Array(x) for k, x in huge.items()})


def _unreadable(content: RecordDict) -> None:
    """Say that bytes are an array, which they are not."""
    arrays = content[ARRAYS]
    broken = {k: Array(a.dtype, tuple(a.shape), a.stype, b"x") for k, a in arrays.items()}
    content[ARRAYS] = ArrayRecord(broken)


def _more_than_asked(content: RecordDict) -> None:
    """Add records of every kind."""
    wrong = ArrayRecord({"w": Array(np.full(3, np.nan))})
    content["further"] = wrong
    if GRADIENT not in content:  # else it was asked for
        content[GRADIENT] = wrong
    content["figures"] = MetricRecord({WEIGHT_KEY: 10**9, "loss": 0.0})
    content["notes"] = ConfigRecord({"json": "{"})


def _nan_metrics(content: RecordDict) -> None:
    content[METRICS]["train_loss"] = float("nan")


GARBAGE = {
    "nan": with_nan,
    "shapes": _shapes,
    "names": _names,
    "nothing": _nothing,
    "json": _no_json,
    "weight": _less_than_nothing,
    "steps": _many_steps,
    "double": _double,
    "unreadable": _unreadable,
    "another order's": _status(lambda status: status["result"].update(order_id="k-a-000000")),
    "types": _status(lambda status: status.update(walltime_left_s="soon")),
    "infinite": _status(lambda status: status["result"]["metrics"].update(loss=float("inf"))),
    "jobs": _status(lambda status: status.update(jobs={"a": "b"})),
}


@each
def test_sites_that_return_garbage(make):
    """Each is refused, again and again, and the run goes on with the others."""
    bad = [FakeSite(n, spoil=spoil, step_s=2.0) for n, spoil in GARBAGE.items()]
    world = World([*sites(), *bad])
    ends_well(world, make)
    assert world.events("order_failed")
    for name in GARBAGE:
        assert world.arrived(name) == world.merged(name) == [], name


@each
def test_records_that_nobody_asked_for(make):
    """They are dropped; the reply counts as what it was asked for."""
    world = World(sites())
    world.sites[1].spoil = _more_than_asked
    ends_well(world, make)
    assert world.events("order_rejected") == []


@each
def test_metrics_that_are_no_numbers(make):
    """A loss of NaN is a figure to look at, and no reason to stop a run."""
    world = World(sites())
    world.sites[0].spoil = _nan_metrics
    ends_well(world, make)


# ---- coming and going ---------------------------------------------------------------------------


@each
def test_a_site_that_restarts_often(make):
    """Each time as another node; no order is trained twice."""
    world = World(sites())
    for at in (50, 90, 200, 400):
        world.grid.restart("b", at=at)
    ends_well(world, make)


@each
def test_a_site_joins_mid_run(make):
    """It takes part from then on."""
    world = World(sites(), rounds=long(make))
    late = FakeSite("late", 2.0, step_s=0.3)
    node = world.grid.join(late)
    world.grid.offline[node] = [(0.0, 40.0)]
    ends_well(world, make)
    assert late.trained
    assert world.merged("late")


@each
def test_a_site_leaves_mid_run(make):
    """What it has done counts, and nobody waits for more."""
    world = World(sites(), Settings(offline_grace_s=100.0), long(make))
    world.grid.away("c", 45.0)
    ends_well(world, make)
    assert world.arrived("c")
    assert max(e["at"] for e in world.arrived("c")) <= 45.0


@each
def test_a_site_leaves_and_returns(make):
    """Beyond the grace its order is given up; back again, it is as good as any."""
    world = World(sites(), Settings(offline_grace_s=30.0), long(make))
    world.grid.away("c", 45.0, 100.0)
    ends_well(world, make)
    assert max(e["at"] for e in world.arrived("c")) > 100.0


@each
def test_a_site_is_back_with_an_order_that_was_given_up(make):
    """Nobody waits for it beyond the grace, and what it has done meanwhile counts, late; a round of
    Flower's has gone on without it, and that is told. Nothing is trained twice."""
    world = World(sites(), Settings(offline_grace_s=15.0), long(make))
    world.grid.away("c", 20.0, 60.0)
    ends_well(world, make)
    given_up = {e["order_id"] for e in world.events("order_failed") if e["facility"] == "c"}
    arrived = {e["order_id"] for e in world.arrived("c")}
    told = {e["order_id"] for e in world.events("order_late")}
    assert given_up
    if isinstance(make(), AsyncStrategy):
        assert given_up <= arrived
        assert told == set()
    else:
        assert told == given_up
        assert arrived.isdisjoint(given_up)
