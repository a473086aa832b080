"""A simulated site's allocations: walltime, idling, successors."""

from __future__ import annotations

from itertools import pairwise

import pytest
from worlds.strategies.simulated_site import (
    Site,
    max_queued,
)

from flwr_hpc import protocol


def test_the_walltime_cuts_an_order_short():
    """It returns the steps that were trained, tells so, and the next job is not there yet."""
    site = Site(0.0, 1000.0, walltime_s=370.0)
    reply = site.train(5000)
    site.clock.advance(380.0)
    assert reply.trained == (300, 300.0)  # 370 - 60 to start - 10 to write
    assert reply.at == 370.0
    assert reply.status.allocation == ""  # so that the next order is bound when a job is up
    assert site.node_hours() == pytest.approx(370 / 3600)


def test_an_allocation_without_room_for_a_step_is_over():
    """It must not be taken for one that is ready."""
    site = Site(0.0, 1000.0, walltime_s=370.0, step_s=100.0)
    reply = site.train(2)
    site.clock.advance(280.0)
    assert reply.trained == (2, 2.0)  # 60 to 260, written at 270; 90 s left
    acquired = site.ask(protocol.ACQUIRE)
    site.clock.advance(2000.0)
    assert acquired.at == 270 + 10 + 1000 + 60
    assert site.node_hours() == pytest.approx((270 + 360) / 3600)  # ends in time, with nothing


def test_orders_never_run_beyond_the_walltime():
    """Whatever is asked for, a job ends in time."""
    site = Site(10.0, walltime_s=300.0, step_s=7.0)
    for seq in range(30):
        reply = site.train(13, seq)
        site.until(lambda reply=reply: reply.content is not None)
    spent: dict[str, float] = {}
    for s in site.pool.segments:
        if s.what != "queue":
            spent[s.allocation] = spent.get(s.allocation, 0.0) + s.end - s.begin
    assert max(spent.values()) <= 300.0 + 1e-6
    assert len(spent) > 2


def test_an_idle_allocation_ends():
    """After the timeout, not before; node-hours count until then."""
    site = Site()
    site.train(100)
    site.clock.advance(170 + 599.0)
    assert site.node_hours() == pytest.approx(769 / 3600)
    site.clock.advance(5000.0)
    assert site.pool.node_s == 770.0


def test_per_round():
    """A job for every order, and nothing kept warm."""
    site = Site(500.0, per_round=True)
    for seq in range(3):
        reply = site.train(100, seq)
        site.until(lambda reply=reply: reply.content is not None)
        assert reply.status.allocation == ""
    assert site.pool.queue.submitted == 3
    assert site.pool.node_s == 3 * 170.0
    assert site.clock.now() == 3 * 670.0


def test_an_acquired_job_takes_the_order_that_follows():
    """Per round as well: one job, not two."""
    site = Site(500.0, per_round=True)
    site.ask(protocol.ACQUIRE)
    site.clock.advance(560.0)
    reply = site.train(100)
    site.clock.advance(1000.0)
    assert (reply.at, site.pool.queue.submitted) == (670.0, 1)


def test_renewal():
    """The successor is submitted ahead by the waits seen and takes over when it is up."""
    site = Site(600.0, max_successors=1, walltime_s=2000.0)
    replies = []
    for seq in range(40):
        replies.append(site.train(90, seq))
        site.until(lambda: replies[-1].content is not None)
        site.clock.advance(site.clock.now() + 5)
    waits = [s.end - s.begin for s in site.pool.segments if s.what == "queue"]
    assert len(waits) >= 3
    gaps = [b.at - a.at for a, b in pairwise(replies)]
    assert max(gaps) < 400  # a gap of 600 + 60 without it
    assert [r.trained[0] for r in replies[:5]] == [90] * 5


def test_a_successor_that_queues_in_time_keeps_nobody_waiting():
    """As the launcher counts it: only time in the queue in which no job ran."""
    site = Site(600.0, max_successors=1, walltime_s=2000.0, forecasts_s=(0.0, 600.0))
    first = site.train(90)
    site.clock.advance(300.0)
    assert site.pool.queued_s() == 300.0  # the one that waits still, too
    site.until(lambda: first.content is not None)
    assert first.status.queued_s == 600.0
    second = site.train(1900, seq=1)
    site.until(lambda: second.content is not None)
    assert site.pool.queue.submitted == 2
    assert second.status.queued_s == 600.0


def test_a_successor_is_not_submitted_too_early():
    """As the launcher does: a quarter of the walltime is used whatever the waits were."""
    site = Site(10.0, 5000.0, max_successors=1, walltime_s=2000.0, forecasts_s=(5000.0, 5000.0))
    site.train(1500)
    site.clock.advance(10 + 0.25 * 2000.0 - 1)
    assert site.pool.queue.submitted == 1
    site.clock.advance(10 + 0.25 * 2000.0 + 1)
    assert site.pool.queue.submitted == 2


def test_several_successors_wait_where_waits_are_longer_than_walltimes():
    """By the launcher's rule; each takes over as the one before it ends, and works alone."""
    waits = 5000.0
    site = Site(*[waits] * 9, max_successors=3, walltime_s=2000.0, forecasts_s=(waits,) * 9)
    replies = []
    for seq in range(90):
        replies.append(site.train(90, seq))
        site.until(lambda: replies[-1].content is not None)
    gaps = [b.at - a.at for a, b in pairwise(replies)]
    assert max(gaps) < 600  # of 5000 + 60 without them
    assert max_queued(site.pool.segments) == 3
    runs = sorted((s.begin, s.end) for s in site.pool.segments if s.what == "train")
    assert all(b[0] >= a[1] for a, b in pairwise(runs))


def test_an_idle_sites_successor_is_submitted_too():
    """When the server asks how it is, as at a real site."""
    site = Site(10.0, 50.0, max_successors=1, walltime_s=1000.0, idle_timeout_s=5000.0)
    site.train(50)
    site.clock.advance(980.0)
    assert site.pool.queue.submitted == 1
    site.ask(protocol.DESCRIBE)
    assert site.pool.queue.submitted == 2


def test_the_order_of_a_job_that_waits_goes_to_the_one_that_starts_first():
    """The second of two jobs starts first: nobody waits for the other."""
    site = Site(3000.0, 100.0, walltime_s=1000.0)
    reply = site.train(50)
    site.pool._submit()
    site.clock.advance(500.0)
    assert reply.trained == (50, 50.0)
    assert reply.status.allocation == "a0001"


def test_without_partial_work_an_order_goes_on_in_the_next_allocation():
    """It is whole when it comes back."""
    site = Site(0.0, 1000.0, walltime_s=370.0, partial_work=False)
    reply = site.train(400)
    site.clock.advance(2000.0)
    assert reply.trained[0] == 400
    assert reply.at == 370 + 1000 + 60 + 100 + 10


def test_a_successor_waits_for_a_message():
    """As at a real site: nobody looks after its jobs between two messages."""
    site = Site(10.0, max_successors=1, walltime_s=2000.0, forecasts_s=(0.0, 100.0))
    site.train(50)
    site.clock.advance(10 + 2000.0 - 100 - 60 + 1)
    assert site.pool.queue.submitted == 1
    site.train(10, seq=1)
    assert site.pool.queue.submitted == 2


def test_the_scheduler_warns_ahead_of_the_end():
    """What is kept back of the walltime may be more than writing takes."""
    site = Site(0.0, walltime_s=1000.0, reserves_s=(90.0, 5.0))
    first = site.train(2000)
    site.clock.advance(999.0)
    assert first.trained == (1000 - 60 - 90, 850.0)
    assert first.at == 1000 - 90 + 10
    second = site.train(2000, seq=1)
    site.clock.advance(3000.0)
    assert second.status.result.steps == 1000 - 60 - 10
