"""A launcher that is killed at any write in the life of allocations that follow one another."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from worlds.site.world import HOUR, Killed, World, long_queue, order


@pytest.mark.parametrize("chain", [False, True])
def test_killed_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain: bool) -> None:
    """Protects from kill -9 of the launcher at each file it publishes, in the life of two
    allocations or of a chain of four: called again, it submits no job twice, leaves none and
    loses no order."""
    replace, writes = Path.replace, [0]

    def count(path: Path, target: Path) -> Path:
        writes[0] -= 1
        if writes[0] == 0:
            path.with_name(f".{target.name}.killed.tmp").write_bytes(path.read_bytes())
            raise Killed()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", count)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # there is no power failure here
    for moment in range(1, 60):
        world = long_queue(tmp_path / str(moment)) if chain else World(tmp_path / str(moment))
        writes[0] = moment
        (live_through_a_chain if chain else live_through_two)(world)
        assert list(world.scheduler.jobs) == [world.name(n) for n in range(4 if chain else 2)]
        if chain:
            assert set(world.scheduler.cancelled) == {world.name(2), world.name(3)}
        else:
            assert world.scheduler.cancelled in ([], [world.name(1)])
    assert writes[0] > 0, "not every write was tried"


def again(world: World, call: str, *args: object) -> object:
    """Call, and once more in a new process if the first was killed."""
    for _ in range(2):
        with contextlib.suppress(Killed):
            return getattr(world.site, call)(*args)
        world.restart()
    raise AssertionError("killed twice")


def worker(world: World, *args: object, **fields: object) -> None:
    with contextlib.suppress(Killed):
        world.worker(*args, **fields)  # type: ignore[arg-type]
        return
    world.worker(*args, **fields)  # type: ignore[arg-type]


def live_through_two(world: World) -> None:
    """Be killed at most once, anywhere."""
    again(world, "acquire")
    world.job(0, "running")
    worker(world, 0, "ready", walltime_left_s=3000.0)
    again(world, "submit", order(), None)
    worker(world, 0, "running", walltime_left_s=50.0)
    again(world, "collect", order().id)
    again(world, "collect", order().id)
    hand_over(world)
    assert world.alloc(1).inbox() == [order().id]
    again(world, "release")


def hand_over(world: World) -> None:
    """Let the successor start, and the first allocation end."""
    world.job(1, "running")
    worker(world, 1, "ready", walltime_left_s=3600.0)
    again(world, "collect", order().id)
    worker(world, 0, "closed")
    status = again(world, "collect", order().id)
    assert (status.state, status.allocation) == ("running", "a0001")  # type: ignore[attr-defined]


def live_through_a_chain(world: World) -> None:
    """Wait long, with successors; be killed at most once, anywhere."""
    again(world, "acquire")
    for _ in range(3):
        world.clock.time += HOUR + 60.0
        again(world, "acquire")
    world.job(0, "running")
    worker(world, 0, "ready", walltime_left_s=3000.0)
    again(world, "submit", order(), None)
    hand_over(world)
    again(world, "release")
