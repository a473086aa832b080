"""Jobs that follow one another: a successor submitted ahead, and a job for each order."""

from __future__ import annotations

import os

import pytest
from worlds.site.world import Killed, World, order

from flwr_hpc.errors import UserError

HOUR = 3600.0


def near_its_end(world: World, left_s: float = 50.0) -> None:
    """Let the first allocation run, with an order, shortly before its walltime's end."""
    world.site.submit(order(), None)
    world.up(0)
    world.worker(0, "running", order_id=order().id, walltime_left_s=left_s)
    world.site.collect(order().id)


@pytest.mark.parametrize("call", ["collect", "acquire", "submit"])
def test_one_successor_is_submitted_in_time(world: World, call: str) -> None:
    """Protects the site from a gap between two jobs, and from a third one."""
    near_its_end(world, 100.0)
    assert len(world.scheduler.jobs) == 1
    world.worker(0, "running", walltime_left_s=50.0)
    args = {"collect": [order().id], "acquire": [], "submit": [order(), None]}[call]
    for _ in range(3):
        getattr(world.restart(), call)(*args)
        world.clock.time += 31
    assert list(world.scheduler.jobs) == [world.name(0), world.name(1)]
    assert not world.alloc(0).released


def test_the_forecast_moves_the_submission(world: World) -> None:
    """Protects long queues: the wait is added to the lead."""
    world.forecast.expected_s = 1000.0
    near_its_end(world, 1061.0)
    assert len(world.scheduler.jobs) == 1
    world.worker(0, "running", walltime_left_s=1059.0)
    world.site.collect(order().id)
    assert len(world.scheduler.jobs) == 2


def test_orders_go_to_the_newest_that_is_ready(world: World) -> None:
    """Protects warmth: a successor is used once it is ready, and the old one is let go."""
    near_its_end(world)
    world.done(order())
    world.worker(0, "ready", walltime_left_s=40.0)
    world.job(1, "running")
    world.worker(1, "loading")
    status = world.site.collect(order().id)
    assert (status.state, status.allocation) == ("done", "a0000")
    assert world.site.submit(order(1), None).allocation == "a0000"
    assert not world.alloc(0).released
    world.worker(1, "ready", walltime_left_s=3600.0)
    status = world.site.collect(order(1).id)
    assert (status.state, status.allocation) == ("running", "a0000")  # keeps what it has
    assert world.alloc(0).released
    assert world.scheduler.cancelled == []
    world.done(order(1))
    status = world.site.collect(order(1).id)
    assert (status.state, status.allocation, status.walltime_left_s) == ("done", "a0001", 3600.0)
    world.worker(0, "closed")
    status = world.site.submit(order(2), None)
    assert (status.state, status.allocation) == ("running", "a0001")
    assert world.alloc(1).inbox() == [order(2).id]
    assert len(world.scheduler.jobs) == 2  # the old one's end needs no third job


def test_the_successor_waits_for_the_old_ones_state(world: World) -> None:
    """Protects the optimizer's state: the order is assigned once the old one has saved it."""
    near_its_end(world)
    world.done(order())
    world.up(1)
    assert world.site.acquire().allocation == "a0001"
    released = world.alloc(0).path / "release"
    os.utime(released, (world.clock.wall(), world.clock.wall()))
    status = world.site.submit(order(1), None)
    assert (status.state, status.allocation) == ("running", "a0001")
    assert world.alloc(1).inbox() == []
    world.restart()
    world.worker(0, "closed")
    assert world.site.collect(order(1).id).allocation == "a0001"
    assert world.alloc(1).inbox() == [order(1).id]


def test_the_successor_does_not_wait_for_ever(world: World) -> None:
    """Protects a site whose old allocation is stuck in an order nobody wants any more."""
    near_its_end(world)
    world.done(order())
    world.up(1)
    world.site.acquire()
    released = world.alloc(0).path / "release"
    os.utime(released, (world.clock.wall(), world.clock.wall()))
    for _ in range(5):
        world.site.submit(order(1), None)
        world.clock.time += 31
        world.worker(0, "running", walltime_left_s=40.0)
        world.worker(1, "ready", walltime_left_s=3000.0)
    world.site.collect(order(1).id)
    assert world.alloc(1).inbox() == [order(1).id]


def test_an_order_the_old_one_left_goes_to_the_successor(world: World) -> None:
    """Protects an order that the walltime cut off: it is finished, and by no third job."""
    near_its_end(world)
    world.worker(0, "closed")
    status = world.site.collect(order().id)
    assert (status.state, status.allocation) == ("queued", "a0001")
    assert world.alloc(1).inbox() == [order().id]
    assert len(world.scheduler.jobs) == 2


@pytest.mark.parametrize("ahead", ["off", "forecast"])
def test_without_a_successor_one_comes_when_needed(world: World, ahead: str) -> None:
    """Protects a run whose job ended before anybody looked."""
    world.restart(renew_ahead=ahead)
    near_its_end(world, 3000.0 if ahead == "forecast" else 10.0)
    assert len(world.scheduler.jobs) == 1
    world.worker(0, "closed")
    assert world.site.collect(order().id).allocation == "a0001"


def test_a_successor_that_fails_harms_nobody(world: World) -> None:
    """Protects running work, and the scheduler from one submission after the other."""
    world.scheduler.refusal = None
    world.site.submit(order(), None)
    world.up(0)
    world.scheduler.refusal = UserError("over the limit of 1 job")
    world.worker(0, "running", walltime_left_s=50.0)
    for _ in range(3):
        assert world.site.collect(order().id).state == "running"
        world.clock.time += 31
        world.worker(0, "running", walltime_left_s=40.0)
    assert len(world.spool.allocations()) == 2
    world.scheduler.refusal = None
    world.worker(0, "closed")
    assert world.site.collect(order().id).allocation == "a0002"


def test_release_cancels_a_queued_successor(world: World) -> None:
    """Protects the queue from jobs nobody needs once the run is over."""
    near_its_end(world)
    world.site.release()
    assert world.scheduler.cancelled == [world.name(1)]
    assert world.alloc(0).released


@pytest.mark.parametrize("moment", ["declared", "submitted"])
def test_killed_while_renewing(world: World, moment: str) -> None:
    """Protects from a second successor after kill -9 in the middle of submitting one."""
    world.site.submit(order(), None)
    world.up(0)
    world.worker(0, "running", walltime_left_s=50.0)
    if moment == "declared":
        world.scheduler.refusal = Killed()
    else:
        world.scheduler.trouble = Killed()
    with pytest.raises(Killed):
        world.site.collect(order().id)
    world.scheduler.refusal = world.scheduler.trouble = None
    for _ in range(2):
        assert world.restart().collect(order().id).state == "running"
    assert list(world.scheduler.jobs) == [world.name(0), world.name(1)]
    assert world.alloc(1).job() is not None


def test_a_preempted_one_yields_to_its_successor(world: World) -> None:
    """Protects an order from waiting in the queue while another job is ready for it."""
    near_its_end(world)
    world.worker(0, "interrupted")
    world.up(1)
    world.job(0, "pending", restarts=1)
    world.worker(1, "ready", walltime_left_s=3500.0)
    status = world.site.collect(order().id)
    assert (status.state, status.allocation) == ("running", "a0001")
    assert world.scheduler.cancelled == [world.name(0)]
    verdict = world.alloc(0).verdict.read()
    assert verdict is not None
    assert verdict.why == "cancelled"


def test_an_order_is_not_left_with_a_job_that_was_overtaken(world: World) -> None:
    """Protects an order from waiting for the later of two queued jobs."""
    near_its_end(world)
    world.worker(0, "interrupted")
    world.job(0, "pending", restarts=1)
    (world.alloc(0).path / "inbox" / order().id).unlink()
    world.alloc(1).assign(order().id)
    world.job(0, "running", restarts=1)
    world.worker(0, "ready", walltime_left_s=3000.0)
    status = world.site.collect(order().id)
    assert (status.state, status.allocation) == ("running", "a0000")
    assert world.alloc(1).inbox() == []


def test_a_job_for_each_order(world: World) -> None:
    """Protects the per-round policy: acquired late, released with its order, one job each."""
    world.restart(policy="per_round")
    for number in range(3):
        assert world.site.acquire().state == "queued"
        world.up(number)
        assert world.site.acquire().state == "ready"
        status = world.site.submit(order(number), None)
        assert (status.state, status.allocation) == ("running", f"a{number:04d}")
        assert world.alloc(number).released
        assert world.alloc(number).inbox() == [order(number).id]
        world.done(order(number))
        status = world.site.collect(order(number).id)
        assert (status.state, status.allocation) == ("done", "")  # nothing is warm
        world.worker(number, "closed")
    assert len(world.scheduler.jobs) == 3


def test_per_round_after_a_kill(world: World) -> None:
    """Protects from a job that idles as its launcher died between assignment and release."""
    world.restart(policy="per_round")
    world.site.submit(order(), None)
    (world.alloc(0).path / "release").unlink()
    world.restart().collect(order().id)
    assert world.alloc(0).released
    world.job(0, "ended", outcome="node_fail")
    assert world.restart().collect(order().id).allocation == "a0001"
    assert world.alloc(1).released


@pytest.mark.parametrize("call", ["status", "status_with_forecast"])
def test_an_idle_warm_site_gets_its_successor(world: World, call: str) -> None:
    """Protects a site that has nothing to do as its walltime ends: being asked for its state is
    enough, and an idle site without a job is asked for nothing."""
    assert getattr(world.site, call)().state == "idle"
    assert world.scheduler.jobs == {}
    world.site.acquire()
    world.up(0)
    world.worker(0, "ready", walltime_left_s=50.0)
    assert getattr(world.restart(), call)().state == "ready"
    assert list(world.scheduler.jobs) == [world.name(0), world.name(1)]
