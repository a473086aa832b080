"""Orders whose site is away for longer than anybody waits: taken when it is back, once."""

from __future__ import annotations

import pytest
from worlds.strategies.bench import ARRAYS, Bench, ready_bench
from worlds.strategies.grid import FakeSite

from flwr_hpc.protocol import Order
from strategies import Binding, Engine, Failure, Plan, Runtime, SiteResult

GRACE_S, BACK_AT_S = 300.0, 30_000.0


def wanted(order: Order | None = None, prefetch_after_s: float | None = None) -> Plan:
    """Return a plan whose result is wanted however late it comes."""
    bound = Binding(order.version if order else 7, ARRAYS)
    return Plan(100, bind=lambda running: bound, late=True, prefetch_after_s=prefetch_after_s)


def away_bench(**plan: float) -> tuple[Bench, FakeSite]:
    site = FakeSite("a", step_s=10.0)
    bench = ready_bench(site, offline_grace_s=GRACE_S)
    bench.engine.request("a", wanted(**plan))
    bench.grid.away("a", 20.0, BACK_AT_S)
    return bench, site


def given_up(bench: Bench) -> Failure:
    failure = bench.run()
    assert isinstance(failure, Failure)
    assert bench.engine.now() < 2 * GRACE_S
    assert not bench.engine.busy("a")
    return failure


@pytest.mark.parametrize("another_node", [False, True])
def test_what_was_trained_meanwhile_is_taken(another_node: bool) -> None:
    """Protects days of a centre's node-hours: the order is the same, its weights those it began
    from, and the site keeps them, since the server never calls it settled."""
    bench, site = away_bench()
    failure = given_up(bench)
    if another_node:
        bench.grid.restart("a")
    result = bench.run()
    assert isinstance(result, SiteResult)
    assert another_node or bench.engine.now() >= BACK_AT_S
    assert result.order.id == failure.order_id
    assert (result.order.version, result.base) == (7, ARRAYS)
    assert site.trained == {failure.order_id: 1}
    assert bench.grid.violations == []


def test_a_site_that_is_back_is_busy_until_it_is_heard() -> None:
    """Protects from another order ahead of the one it has: what it works on comes first."""
    bench, _ = away_bench()
    given_up(bench)
    while not bench.engine.sites["a"].online:
        bench.engine.discover()
    assert bench.engine.busy("a")


def test_the_next_order_that_waited_there_is_taken_too() -> None:
    """Protects a site that trains without a pause: it had two."""
    bench, site = away_bench(prefetch_after_s=5.0)
    while not bench.engine.due_prefetch("a"):
        bench.engine.discover()
    bench.engine.request("a", wanted())
    given_up(bench)
    first = bench.run()
    bench.engine.settle("a")
    second = bench.run()
    assert [r.order.seq for r in (first, second)] == [0, 1]  # type: ignore[union-attr]
    assert list(site.trained.values()) == [1, 1]


def test_a_server_that_was_restarted_meanwhile_takes_it() -> None:
    """Protects it from a reboot of the server's host while the line is down."""
    bench, site = away_bench()
    order_id = given_up(bench).order_id
    bench.engine.commit()
    bench.grid.new_run()
    runtime = Runtime(bench.grid.clock, checkpoints=bench.runtime.checkpoints)
    bench.engine = Engine(bench.grid, runtime)
    bench.engine.wait_for(["a"])
    bench.engine.resume(wanted)
    result = bench.run()
    assert isinstance(result, SiteResult)
    assert result.order.id == order_id
    assert site.trained == {order_id: 1}


def test_what_nobody_wants_is_told_once() -> None:
    """Protects whoever asks where a site's work went: a round has gone on without it."""
    bench = ready_bench(FakeSite("a", step_s=10.0), offline_grace_s=GRACE_S)
    bench.train(steps=100)
    bench.grid.away("a", 20.0, BACK_AT_S)
    failure = given_up(bench)
    assert bench.engine.events(timeout=BACK_AT_S) == []
    (told,) = [fields for _, event, fields in bench.log if event == "order_late"]
    assert told["order_id"] == failure.order_id
    assert f"more than {GRACE_S:g} s" in told["reason"]
