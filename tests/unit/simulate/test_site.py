"""The life of an order at a simulated site."""

from __future__ import annotations

from worlds.strategies.simulated_site import (
    Site,
    states,
)

from flwr_hpc import protocol
from flwr_hpc.protocol import Order


def test_acquire_then_train():
    """ACQUIRE is answered when the job is up; the order is given then (late binding)."""
    site = Site(3600.0)
    acquired = site.ask(protocol.ACQUIRE)
    site.clock.advance(5000.0)
    assert (acquired.at, acquired.status.state) == (3660.0, "ready")
    assert acquired.status.walltime_left_s == 7200.0 - 60.0
    assert site.pool.queue.submitted == 1


def test_an_order_is_trained():
    """The steps asked for, in their time, with what it took by the site's clock."""
    site = Site(100.0)
    reply = site.train(500)
    site.clock.advance(2000.0)
    assert reply.at == 100 + 60 + 500 + 10
    assert reply.trained == (500, 500.0)
    status = reply.status
    assert (status.state, status.result.seconds["train"]) == ("done", 500.0)
    assert status.result.metrics["train_loss"] == 2.0
    assert status.queued_s == 100.0
    assert status.allocation == "a0000"
    assert states(site)[:3] == [("queue", 0, 100), ("load", 100, 160), ("train", 160, 670)]


def test_an_order_sent_twice_is_trained_once():
    """Idempotent: while it runs, and when it is done."""
    site = Site()
    first = site.train(100)
    site.clock.advance(100.0)
    again = site.train(100)
    site.clock.advance(300.0)
    assert first.content is None  # one message at a time: the new one has taken its place
    assert again.trained == (100, 100.0)
    third = site.train(100)
    site.clock.advance(310.0)
    assert third.trained == (100, 100.0)
    assert (site.pool.orders, site.steps) == (1, 100)


def test_a_long_poll_is_answered_in_time():
    """With the state reached so far: queued, then running with its step, then done."""
    site = Site(100.0)
    polls = [site.train(500, wait_s=90.0)]
    for _ in range(8):
        site.until(lambda: polls[-1].content is not None)
        polls.append(site.collect(500, wait_s=90.0))
        site.clock.advance(site.clock.now())
    found = [(p.status.state, p.status.step, p.at) for p in polls if p.content is not None]
    assert found[:3] == [("queued", 0, 90.0), ("running", 20, 180.0), ("running", 110, 270.0)]
    assert found[-1][0] == "done"


def test_an_unknown_order_cannot_be_collected():
    """The server hands it in again."""
    site = Site()
    reply = site.collect(10)
    site.clock.advance(1.0)
    assert reply.status.state == "failed"


def test_evaluation_and_initialization():
    """No steps; the loss of the weights that were sent; the initial weights."""
    site = Site()
    reply = site.ask(protocol.EVALUATE, Order("k", "x", 0, "evaluate"))
    site.clock.advance(100.0)
    assert reply.status.result.metrics["held_out_loss"] == 0.0
    assert protocol.ARRAYS not in reply.content
    reply = site.ask(protocol.TRAIN, Order("k", "x", 1, "initialize"))
    site.clock.advance(200.0)
    assert float(reply.content[protocol.ARRAYS]["n"].numpy()[0]) == 0.0


def test_transfers_and_latency():
    """Weights take their time, words almost none."""
    site = Site(latency_s=2.0, transfer_s=20.0)
    reply = site.train(100)
    site.clock.advance(1000.0)
    assert reply.at == 60 + 100 + 10 + 22
    acquired = site.ask(protocol.ACQUIRE)
    t = site.clock.now()
    site.clock.advance(t + 500)
    assert acquired.at <= t + 62
