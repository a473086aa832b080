"""Requests against the traps of Flower: lost messages, error replies, refused pushes, deadlines."""

from __future__ import annotations

import pytest
from worlds.strategies.bench import ARRAYS, Bench, ready_bench
from worlds.strategies.grid import FakeSite
from worlds.strategies.toy_model import with_nan

from flwr_hpc.protocol import ACQUIRE, COLLECT, DESCRIBE, TRAIN, Result, Status
from strategies import (
    Binding,
    Failure,
    FatalSiteError,
    Plan,
    SiteResult,
)


@pytest.mark.parametrize("kind", [DESCRIBE, ACQUIRE, TRAIN, COLLECT])
def test_a_lost_message_is_sent_again(kind):
    """A SuperNode that restarts forgets what it was asked; nothing ever answers."""
    site = FakeSite("a", step_s=10)
    bench = Bench(site, reply_grace_s=100)
    bench.grid.lose[kind] = 1
    bench.engine.wait_for(["a"], timeout=1000)
    bench.train(steps=20)
    assert isinstance(bench.run(), SiteResult)
    assert all(n == 1 for n in site.trained.values())


@pytest.mark.parametrize("kind", [ACQUIRE, TRAIN, COLLECT])
@pytest.mark.parametrize("code", [0, 2, 3, 5, 8])
def test_an_error_reply_is_retried(kind, code):
    """Code 8 is a killed ClientApp: the same order again re-attaches."""
    site = FakeSite("a", step_s=10)
    bench = ready_bench(site)
    bench.grid.errors[kind] = [code, code]
    bench.train(steps=20)
    arrival = bench.run()
    assert isinstance(arrival, SiteResult)
    assert site.trained == {"run-a-000000": 1}


def test_an_order_says_below_which_number_none_is_open():
    """A site may delete what came of those, and of no other: the newest but one may be open."""
    bench, settled = ready_bench(FakeSite("a", step_s=10)), []
    plan = Plan(10, prefetch_after_s=0.0, bind=lambda running: Binding(0, ARRAYS))
    bench.engine.request("a", plan)
    for _ in range(3):
        while not bench.engine.due_prefetch("a"):
            bench.engine.events()
        bench.engine.request("a", plan)
        settled.append(bench.run().order.settled)
        bench.engine.settle("a")
    assert settled == [0, 0, 1]
    arrived = bench.run().order
    assert (arrived.seq, arrived.settled) == (3, 2)


def test_error_replies_end_after_the_retries():
    """Retries are counted; the failure tells the reason."""
    bench = ready_bench(retries=2)
    bench.grid.errors[TRAIN] = [8] * 10
    bench.train()
    failure = bench.run()
    assert isinstance(failure, Failure)
    assert "error 8" in failure.reason
    assert bench.sent(TRAIN) == 3
    assert [f["attempt"] for _, e, f in bench.log if e == "order_failed"] == [1, 2, 3]


def test_a_crash_while_described_does_not_make_a_site_plain():
    """Only an app that has no such handler is an ordinary one."""
    bench = Bench(FakeSite("a"))
    bench.grid.errors[DESCRIBE] = [8, 8]
    bench.engine.wait_for(["a"], timeout=100)
    assert bench.engine.sites["a"].launcher


def test_a_refused_push_is_tried_later():
    """`push_messages` answers "" for a refused message."""
    bench = ready_bench()
    bench.grid.refuse = 3
    bench.train()
    assert isinstance(bench.run(), SiteResult)


def test_a_push_that_is_always_refused_fails():
    """A message that is too large for Flower must not be tried for ever."""
    bench = ready_bench()
    bench.train()
    bench.grid.refuse = 10**6
    failure = bench.run()
    assert isinstance(failure, Failure)
    assert "refuses" in failure.reason


def test_refused_pushes_count_in_a_row():
    """An order that takes for days must not end by a refusal now and then."""
    bench = ready_bench(FakeSite("a", step_s=100.0), retries=0)
    bench.train()
    bench.grid.refuse = 8
    assert bench.engine.events(timeout=500) == []
    assert bench.sent(TRAIN) == 1
    bench.grid.refuse = 8
    assert isinstance(bench.run(), SiteResult)


def test_acquire_deadline_cancels_the_job():
    """A queued job that comes too late is cancelled at the site."""
    site = FakeSite("a", queue_s=10_000)
    bench = ready_bench(site, acquire_deadline_s=600)
    bench.train()
    failure = bench.run()
    assert "no allocation within 600 s" in failure.reason
    bench.engine.events(timeout=100)
    assert site.cancelled == 1
    assert not site.trained


def test_order_deadline():
    """An order that takes too long is given up; its late result is ignored."""
    site = FakeSite("a", step_s=10)
    bench = ready_bench(site, order_deadline_s=100)
    bench.train(steps=20)
    failure = bench.run()
    assert "not done within 100 s" in failure.reason
    assert bench.engine.events(timeout=500) == []
    bench.train(steps=1, version=1)
    arrival = bench.run()
    assert isinstance(arrival, SiteResult)
    assert arrival.order.id == "run-a-000001"


def test_duplicates_are_ignored():
    """Every reply arrives twice, every result is reported once."""
    bench = ready_bench()
    bench.grid.duplicate = True
    bench.train()
    assert isinstance(bench.run(), SiteResult)
    assert bench.engine.events(timeout=100) == []


def test_a_fatal_error_is_not_tried_again():
    """What cannot be fixed ends a run that has no other site, and the message names this one."""
    bench = ready_bench(FakeSite("a", fail=Status("failed", error="no such file", fatal=True)))
    bench.train()
    failure = bench.run()
    assert isinstance(failure, Failure)
    assert (failure.fatal, bench.sent(ACQUIRE)) == (True, 1)
    assert bench.engine.reachable() == []
    with pytest.raises(FatalSiteError, match="a: no such file"):
        bench.engine.require(1)


def test_a_failure_that_may_mend_is_retried():
    """Without `fatal`, the retries are used up first."""
    bench = ready_bench(FakeSite("a", fail=Status("failed", error="node down")), retries=1)
    bench.train()
    failure = bench.run()
    assert isinstance(failure, Failure)
    assert failure.reason == "node down"
    assert bench.sent(ACQUIRE) == 2


def test_an_order_that_the_site_refuses_is_not_sent_again():
    """The site lacks what it goes on from: only another order will do."""
    lacking = Result("", "failed", error="no weights", refused=True)
    bench = ready_bench(FakeSite("a", fail=Status("failed", result=lacking)), retries=3)
    bench.train()
    failure = bench.run()
    assert isinstance(failure, Failure)
    assert failure.reason == "no weights"
    assert bench.sent(ACQUIRE) == 1


def test_weights_that_are_not_finite_are_rejected():
    """NaN never reaches the model."""
    bench = ready_bench(FakeSite("a", spoil=with_nan))
    bench.train()
    failure = bench.run()
    assert isinstance(failure, Failure)
    assert "not finite" in failure.reason
    assert "order_rejected" in bench.names()
