"""What keeps a site from working, and replies that get lost on the way."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord
from worlds.strategies.bench import Bench, ready_bench
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import initial_arrays

from flwr_hpc.protocol import DESCRIBE, TRAIN, Status
from strategies import HpcStrategy, Runtime, Settings, SiteResult, run_strategy


def test_a_blocked_site_is_waited_for():
    """Protects orders from a full disk: nothing is counted, and the reason is told once."""
    site = FakeSite("a", fail=Status("blocked", reason="the disk is full"))
    bench = ready_bench(site, retries=0, retry_delay_s=5)
    bench.train()
    assert bench.engine.events(timeout=500) == []
    site.fail = None
    assert isinstance(bench.run(), SiteResult)
    assert "order_failed" not in bench.names()
    told = [f["reason"] for _, event, f in bench.log if event == "site_trouble"]
    assert told == ["the disk is full", ""]
    assert len(bench.grid.pushed) < 120  # no faster than the pause


def test_a_reply_that_the_site_knows_to_be_lost_is_asked_for_again():
    """Protects a quarter of an hour: the order is sent again, trained once, and it is told."""
    bench = ready_bench(FakeSite("a", step_s=1.0), reply_grace_s=10_000, wait_s=60)
    asked: list[tuple[str, float]] = []

    def lost(facility: str, message_id: str, sent_at: float) -> str:
        asked.append((message_id, bench.engine.now() - sent_at))
        return "its ClientApp died" if asked[-1][1] > 100 else ""

    bench.runtime.lost = lost
    bench.grid.lose[TRAIN] = 1
    bench.train(steps=10)
    result = bench.run()
    assert isinstance(result, SiteResult)
    assert bench.engine.now() < 200
    assert bench.grid.nodes[101].trained == {result.order.id: 1}
    told = [f for _, event, f in bench.log if event == "reply_lost"]
    assert told == [{"facility": "a", "kind": TRAIN, "reason": "its ClientApp died"}]
    failed = [f["reason"] for _, event, f in bench.log if event == "order_failed"]
    assert failed == ["no reply: its ClientApp died"]


def test_a_reply_that_is_being_fetched_is_not_lost():
    """Protects large models on slow lines: the grid sees to it that a transfer moves."""
    bench = ready_bench(FakeSite("a", step_s=1.0), reply_grace_s=10, wait_s=60)
    bench.grid.receiving = lambda message_id: bench.engine.now() < 500
    bench.grid.lose[TRAIN] = 1
    bench.train(steps=10)
    assert isinstance(bench.run(), SiteResult)
    assert bench.engine.now() > 500
    assert [event for _, event, _ in bench.log].count("reply_lost") == 1


@pytest.mark.parametrize("deaths", [1, 3])
def test_what_a_dead_supernode_held_is_sent_to_its_successor_at_once(deaths: int):
    """Protects sites with keys, whose SuperNode returns as the same node: nobody waits for an
    answer that cannot come, the order is trained once, and its tries are not used up."""
    bench = ready_bench(FakeSite("a", step_s=1.0), retries=0, reply_grace_s=10_000, wait_s=60)
    bench.train(steps=100)
    for _ in range(deaths):
        assert bench.engine.events(timeout=20) == []
        bench.grid.come_back("a")
    result = bench.run()
    assert isinstance(result, SiteResult)
    assert bench.engine.now() < 110
    assert bench.grid.nodes[101].trained == {result.order.id: 1}
    assert {"order_failed", "reply_lost"}.isdisjoint(bench.names())
    assert bench.grid.violations == []


def test_a_node_that_dies_before_it_said_who_it_is_is_asked_again():
    """Protects the first minute of a site, whose person starts it twice."""
    bench = Bench(FakeSite("a"), reply_grace_s=10_000)
    bench.grid.lose[DESCRIBE] = 1
    bench.engine.discover()
    bench.grid.come_back("a")
    assert bench.engine.wait_for(["a"], timeout=10) == ["a"]


def test_an_answer_that_outlived_its_supernode_is_taken():
    """Protects from asking twice: what has left the site is pulled before it is asked again."""
    bench = ready_bench(FakeSite("a", step_s=1.0))
    bench.train(steps=5)
    while bench.sent(TRAIN) == 0:
        bench.engine.discover()
    bench.grid.clock.sleep(20.0)
    bench.grid.come_back("a")
    assert isinstance(bench.run(), SiteResult)
    assert bench.sent(TRAIN) == 1


def test_an_answer_that_is_being_fetched_is_not_asked_for_again():
    """Protects large models on slow lines: the site has done with it."""
    bench = ready_bench(FakeSite("a", step_s=1.0))
    bench.grid.receiving = lambda message_id: True
    bench.grid.lose[TRAIN] = 1
    bench.train(steps=5)
    assert bench.engine.events(timeout=20) == []
    bench.grid.come_back("a")
    assert bench.engine.events(timeout=20) == []
    assert bench.sent(TRAIN) == 1


@pytest.mark.parametrize("back_after_s", [None, 40.0])
def test_the_last_evaluation_does_not_wait_for_who_is_gone(back_after_s):
    """Protects the end of a run: a site that is away for a minute is left out, one that is back
    sooner is not."""
    grid = FakeGrid([FakeSite("a"), FakeSite("b", step_s=90.0)])
    ended_at: list[float] = []

    def emit(event, **fields):
        if event == "aggregated":
            now = grid.clock.now()
            ended_at.append(now)
            grid.away("b", now + 20.0, now + 20.0 + (back_after_s or float("inf")))

    runtime = Runtime(clock=grid.clock, emit=emit, settings=Settings(final_evaluation_s=600.0))
    result = run_strategy(
        HpcStrategy(), grid, initial_arrays(), 1,
        train_config=ConfigRecord({"steps": 1}), runtime=runtime,
    )  # fmt: skip
    assert result.evaluate_metrics_clientapp
    waited = grid.clock.now() - ended_at[0]
    assert (80.0 <= waited < 90.0) if back_after_s is None else (90.0 <= waited < 110.0)


@pytest.mark.parametrize("plain", [False, True])
def test_a_node_that_poses_as_another_site_is_turned_away(plain: bool):
    """Protects a site's name where sites have keys of their own: whoever answers in it from
    another node, or says nothing of itself, gets no work; the right one does."""
    impostor = FakeSite("anything", plain=True) if plain else FakeSite("a", step_s=1.0)
    bench = Bench(FakeSite("a", step_s=1.0), impostor, retries=0)
    bench.runtime.may_speak_for = lambda node_id, site: (node_id, site) == (101, "a")
    bench.engine.wait_for(["a"], timeout=100)
    bench.train()
    assert isinstance(bench.run(), SiteResult)
    assert list(bench.engine.sites) == ["a"]
    assert not bench.grid.nodes[102].trained
    assert bench.names().count("site_refused") == 1
