"""Several successors, where waits are longer than walltimes."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.site.world import HOUR, World, long_queue, order


@pytest.fixture
def long(tmp_path: Path) -> World:
    return long_queue(tmp_path / "long")


def test_a_chain_where_waits_exceed_walltimes(long: World) -> None:
    """Protects long queues: a job a walltime later than the one before it, at most three more;
    seen to by every message, in a process of its own."""
    long.site.acquire()
    began, submitted = long.clock.time, []
    while long.clock.time < began + 6 * HOUR:
        long.restart().acquire()
        submitted += [long.clock.time - began] * (len(long.scheduler.jobs) - 1 - len(submitted))
        long.clock.time += 60.0
    assert submitted == [pytest.approx(h * HOUR, abs=200.0) for h in (1, 2, 3)]


def test_a_chain_of_one(long: World) -> None:
    """Protects accounts with few jobs: max_successors is kept to."""
    long.restart(max_successors=1).acquire()
    for _ in range(500):
        long.clock.time += 60.0
        long.site.acquire()
    assert len(long.scheduler.jobs) == 2


def test_orders_wait_for_the_first_of_a_chain(long: World) -> None:
    """Protects an order from the last place in the queue."""
    long.site.acquire()
    long.clock.time += 1.5 * HOUR
    assert long.site.acquire().allocation == "a0000"
    assert len(long.scheduler.jobs) == 2
    assert long.site.submit(order(), None).allocation == "a0000"
    assert long.alloc(1).inbox() == []


def chain_of_two(world: World) -> None:
    """Let the first allocation run, and two more wait."""
    world.site.acquire()
    world.clock.time += 1.5 * HOUR
    world.site.acquire()
    world.clock.time += HOUR
    world.site.acquire()
    world.up(0)
    assert world.site.acquire().state == "ready"
    assert len(world.scheduler.jobs) == 3


def test_one_that_overtakes_costs_no_place_in_the_queue(long: World) -> None:
    """Protects a job's hours in the queue: when a later one starts first, it stays its successor,
    and it takes over when it starts in its turn."""
    chain_of_two(long)
    long.up(2)
    long.worker(2, "ready", walltime_left_s=3500.0)
    assert long.site.acquire().allocation == "a0002"
    assert long.alloc(0).released
    assert long.scheduler.cancelled == []
    long.worker(0, "closed")
    long.up(1)
    long.worker(1, "ready", walltime_left_s=3590.0)
    long.worker(2, "ready", walltime_left_s=2000.0)
    assert long.site.acquire().allocation == "a0001"
    assert long.alloc(2).released


@pytest.mark.parametrize("closed", [False, True])
def test_one_let_go_for_an_older_one_does_not_stop_renewal(long: World, closed: bool) -> None:
    """Protects the chain when jobs start out of turn: the older one, taking over from a newer, gets
    a successor of its own."""
    chain_of_two(long)
    long.up(2)
    long.site.acquire()
    long.worker(0, "closed")
    long.up(1)
    long.worker(1, "ready", walltime_left_s=3590.0)
    long.worker(2, "ready", walltime_left_s=2000.0)
    assert long.site.acquire().allocation == "a0001"
    if closed:
        long.worker(2, "closed")
    long.clock.time += 0.5 * HOUR
    long.worker(1, "ready", walltime_left_s=1700.0)
    assert long.site.acquire().allocation == "a0001"
    assert len(long.scheduler.jobs) == 4


def test_release_cancels_a_whole_chain(long: World) -> None:
    """Protects the queue from jobs nobody needs, and accounts for each."""
    chain_of_two(long)
    status = long.site.release()
    assert sorted(long.scheduler.cancelled) == [long.name(1), long.name(2)]
    assert set(status.jobs) == set(status.ledger) == {"a0000", "a0001", "a0002"}
    assert long.site.status().state == "idle"
    assert len(long.scheduler.jobs) == 3
