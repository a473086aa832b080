"""A site ends its jobs: released, cancelled, on a full disk, without the scheduler."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from worlds.site.world import Killed, World, order

from flwr_hpc.schedulers.base import SchedulerUnavailableError


def test_release_lets_a_worker_finish_and_cancels_what_waits(world: World) -> None:
    """Protects running work on release, and the queue from jobs nobody needs."""
    world.site.submit(order(), None)
    world.up(0)
    world.site.release()
    assert world.alloc(0).released
    assert world.site.collect(order().id).state == "running"
    assert world.site.acquire().allocation == "a0001"  # a released one takes no new orders
    world.restart().release()
    assert world.scheduler.cancelled == ["run-fac-a0001"]


def test_cancel_all_leaves_nothing(world: World) -> None:
    """Protects Ctrl-C, also after a crash between submit and job.json; then a fresh start."""
    world.site.submit(order(), None)
    world.scheduler.trouble = Killed()
    world.alloc(0).release()
    with pytest.raises(Killed):
        world.site.acquire()
    world.scheduler.trouble = None
    world.restart().cancel_all()
    assert world.scheduler.cancelled == ["run-fac-a0000", "run-fac-a0001"]
    assert world.site.live_jobs() == []
    assert world.site.status().state == "idle"
    assert world.site.collect(order().id).state == "queued"  # cancelled: held against nobody


def test_cancel_all_on_a_full_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user's budget: what cannot be written down is cancelled all the same."""
    world.site.acquire()
    world.up(0)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flwr_hpc.files.draft", full)
    monkeypatch.setattr(Path, "touch", full)
    world.restart().cancel_all()
    assert world.scheduler.cancelled == ["run-fac-a0000"]


def test_cancel_all_names_what_may_be_left(world: World) -> None:
    """Protects the user's budget: a job that could not be cancelled is named."""
    world.site.acquire()
    world.job(0, "unknown")
    with pytest.raises(SchedulerUnavailableError, match="run-fac-a0000"):
        world.site.cancel_all()
    assert [job["name"] for job in world.site.live_jobs()] == ["run-fac-a0000"]
