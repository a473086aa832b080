"""A simulated site under preemption, failures, outages and release."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from worlds.strategies.driven import record
from worlds.strategies.simulated_site import (
    FOREVER,
    Reply,
    Site,
    states,
)

from flwr_hpc import protocol
from flwr_hpc.protocol import Order


def test_a_preempted_order_goes_on_from_its_checkpoint():
    """Nothing is trained twice; the queue's wait is counted."""
    site = Site(0.0, 1000.0, preemptions_per_hour=1.0, faults=(160.0,))
    reply = site.train(500)
    site.clock.advance(3000.0)
    # 100 steps from 60 to 160, 1000 s in the queue, 60 to start, the other 400, 10 to write
    assert reply.trained == (500, 500.0)
    assert reply.at == 160 + 1000 + 60 + 400 + 10
    assert (site.steps, site.pool.orders) == (500, 1)
    assert reply.status.queued_s == 1000.0


def test_the_mean_gradient_is_over_all_steps_of_an_order():
    """SCAFFOLD: those before a preemption included; a second record takes its time, too."""
    site = Site(0.0, 1000.0, preemptions_per_hour=1.0, faults=(160.0,), transfer_s=20.0)
    asked = Order("k", "x", 0, "train", 0, 500, options={protocol.MEAN_GRADIENT: True})
    content = RecordDict({protocol.ORDER: ConfigRecord({"json": protocol.to_json(asked)})})
    content[protocol.ARRAYS] = record({"n": np.zeros(1)})
    content[protocol.CORRECTION] = record({"n": np.full(1, 3.0)})
    reply = Reply(site.clock)
    site.handle(Message(content, 1, protocol.TRAIN), reply.take)
    site.clock.advance(3000.0)
    assert reply.trained == (500, 500.0)
    assert reply.content[protocol.GRADIENT]["n"].numpy() == 3.0
    assert reply.at == 160 + 1000 + 60 + 400 + 10 + 2 * 20


def test_a_site_keeps_its_weights_and_merges_what_comes():
    """With alpha = 1/2 and a weight of 0 that comes, half of what it has; from these or none."""
    site, found = Site(), []
    for merges, after in ((None, -1), ([], 0), (["n"], 1), (["n"], 1)):
        options = {"after": after, "alpha": 0.5}
        asked = Order("k", "x", len(found), "train", 0, 4, options=options, merges=merges)
        reply = site.ask(protocol.TRAIN, asked)
        site.until(lambda reply=reply: reply.content is not None)
        found.append(reply)
    assert [float(r.content[protocol.ARRAYS]["n"].numpy()[0]) for r in found[:3]] == [4, 8, 8]
    last = found[3].status
    assert (last.state, last.fatal, last.result.refused) == ("failed", False, True)


def test_a_part_of_the_weights_takes_its_part_of_the_time():
    """Transfers are as long as what they carry."""
    site = Site(transfer_s=20.0)
    for names, time_s in ((["n"], 20.0), ([], 20.0), (["n", "m"], 40.0)):
        tensors = record({name: np.zeros(1) for name in names})
        content = RecordDict({protocol.ARRAYS: tensors})
        assert site.transfer_s(content) == time_s


def test_a_failed_job_loses_its_order_and_tries_again():
    """The steps of the first job are gone, those of the second count."""
    site = Site(0.0, 1000.0, failures_per_hour=1.0, faults=(160.0,))
    reply = site.train(500)
    site.clock.advance(3000.0)
    assert reply.trained == (500, 500.0)
    assert reply.at == 160 + 1000 + 60 + 500 + 10
    assert site.steps == 500  # those of the first job were never handed to anybody


def test_an_order_whose_jobs_fail_again_and_again():
    """Is reported as failed, and can be handed in anew."""
    site = Site(10.0, failures_per_hour=1.0, faults=(100.0, 100.0, 100.0))
    reply = site.train(500)
    site.clock.advance(3000.0)
    assert (reply.status.state, reply.status.error) == ("failed", "gave up after 3 allocations")
    again = site.train(500)
    site.clock.advance(6000.0)
    assert again.trained == (500, 500.0)


def test_training_that_diverges(monkeypatch):
    """Is refused like the trainer refuses it, and ends nothing else; evaluated, it has no loss."""
    site, nan = Site(), float("nan")
    monkeypatch.setattr(site.learner, "train", lambda i, weights, *_: (weights, nan))
    monkeypatch.setattr(site.learner, "evaluate", lambda weights: nan)
    reply = site.train(500)
    site.clock.advance(3000.0)
    assert (reply.status.state, reply.status.error) == ("failed", "training diverged")
    assert reply.status.result.refused
    asked = site.ask(protocol.EVALUATE, Order("k", "x", 7, "evaluate", 0, 0))
    site.clock.advance(6000.0)
    assert (asked.status.state, asked.status.result.metrics) == ("done", {})


def test_an_outage():
    """What runs is lost, the site is not to be reached, and nothing starts until it is back."""
    site = Site(0.0, outages=((200.0, 5000.0),))
    reply = site.train(500)
    site.clock.advance(199.0)
    assert site.online()
    site.clock.advance(201.0)
    assert not site.online()
    site.clock.advance(9000.0)
    assert site.online()
    assert reply.at == 5000 + 60 + 500 + 10
    assert reply.trained == (500, 500.0)


def test_release_cancels_what_waits():
    """A queued job leaves the queue; a ready one that has nothing to do ends."""
    site = Site(1000.0)
    site.ask(protocol.ACQUIRE, wait_s=10.0)
    site.clock.advance(20.0)
    site.ask(protocol.RELEASE)
    site.clock.advance(5000.0)
    assert (site.pool.node_s, states(site)) == (0.0, [("queue", 0, 20)])


def test_release_of_a_queued_job_with_an_order_submits_no_other():
    """The order is begun again only when somebody asks for it, as by the launcher."""
    site = Site(1000.0, 0.0)
    site.train(500, wait_s=10.0)
    site.clock.advance(20.0)
    site.ask(protocol.RELEASE)
    site.clock.advance(5000.0)
    assert (site.pool.node_s, states(site)) == (0.0, [("queue", 0, 20)])
    reply = site.collect(500)
    site.clock.advance(7000.0)
    assert reply.trained == (500, 500.0)


def test_a_released_allocation_finishes_its_order():
    """And ends then."""
    site = Site()
    reply = site.train(500)
    site.clock.advance(100.0)
    site.handle(Message(RecordDict(), 1, protocol.RELEASE), lambda content: None)
    site.clock.advance(1000.0)
    assert site.pool.node_s == 570.0
    again = site.collect(500)
    site.clock.advance(1010.0)
    assert (reply.trained if reply.content else again.trained) == (500, 500.0)


def test_node_hours_are_those_of_the_timeline():
    """What is charged is what the allocations held, faults and all."""
    site = Site(
        300.0,
        20.0,
        700.0,
        nodes=3,
        max_successors=1,
        walltime_s=1500.0,
        preemptions_per_hour=1.0,
        failures_per_hour=1.0,
        faults=(FOREVER, FOREVER, 400.0, FOREVER, 900.0, FOREVER, 333.0),
    )
    for seq in range(30):
        reply = site.train(77, seq)
        site.until(lambda reply=reply: reply.content is not None)
    site.ask(protocol.RELEASE)
    site.clock.advance(site.clock.now() + 3000)
    held = sum(s.end - s.begin for s in site.pool.segments if s.what != "queue")
    assert site.node_hours() == pytest.approx(3 * held / 3600)
    assert not site.pool._allocations


def test_finished_orders_are_forgotten():
    """A site's memory does not grow with the orders it has done."""
    site = Site()
    for seq in range(50):
        reply = site.train(1, seq)
        site.until(lambda reply=reply: reply.content is not None)
    assert len(site._tasks) <= 4
