"""What is reported of payloads on their way: how far, how fast, what was sent twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from worlds.clock import FakeClock

from flwr_hpc.exchange.http_server.meter import EVERY_S, LEAST_BYTES, MOST_MOVES, Meter, Move
from flwr_hpc.exchange.store import Reference

MB = 1_000_000
REF = Reference.of("global", "a" * 64, 40 * MB)


class World:
    def __init__(self) -> None:
        self.clock, self.moves = FakeClock(), list[Move]()
        self.meter = Meter(lambda move: self.moves.append(replace(move)), self.clock)

    def move(self, count: int, seconds: float, ref: Reference = REF, begins_at: int = 0) -> None:
        with self.meter.request("node-7", "to_site", ref, begins_at) as moved:
            self.clock.time += seconds
            moved(count)


def test_a_payload_on_its_way_is_reported_now_and_then_and_at_its_end() -> None:
    """Protects whoever waits: progress and rate, but no event per piece."""
    world = World()
    with world.meter.request("node-7", "to_site", REF, 0) as moved:
        for _ in range(40):
            world.clock.time += 1.0
            moved(MB)
    assert [m.bytes for m in world.moves] == [MB * n for n in (5, 10, 15, 20, 25, 30, 35, 40)]
    last = world.moves[-1]
    assert (last.done, last.seconds, last.site, last.way) == (True, 40.0, "node-7", "to_site")
    assert all(b.reported_at - a.reported_at >= EVERY_S for a, b in zip(
        world.moves, world.moves[1:-1], strict=False
    ))  # fmt: skip


def test_time_in_which_the_line_is_down_counts_for_no_rate() -> None:
    """Protects the rate: it is the line's, not that of an hour without one."""
    world = World()
    world.move(10 * MB, 10.0)
    world.clock.time += 3600.0
    world.move(30 * MB, 20.0)
    assert (world.moves[-1].seconds, world.moves[-1].bytes) == (30.0, 40 * MB)


def test_parallel_requests_share_their_time() -> None:
    """Protects the rate of a payload that comes in several streams."""
    world = World()
    with world.meter.request("node-7", "to_site", REF, 0) as one:
        with world.meter.request("node-7", "to_site", REF, 0) as other:
            world.clock.time += 10.0
            one(20 * MB)
            other(20 * MB)
        assert len([m for m in world.moves if m.done]) == 0
    assert world.moves[-1].seconds == 10.0


def test_what_is_sent_again_is_counted() -> None:
    """Protects against a cut that costs more than it must, and nobody notices."""
    world = World()
    world.move(15 * MB, 1.0)
    world.move(28 * MB, 1.0)
    assert world.moves[-1].bytes - REF.bytes == 3 * MB
    world.move(40 * MB, 1.0)  # asked for once more: another move
    assert world.moves[-1].bytes == 40 * MB


def test_an_upload_that_goes_on_in_a_later_server_is_whole_at_its_end() -> None:
    """Protects its last report; the rate is of what this server moved."""
    world = World()
    world.move(30 * MB, 10.0, begins_at=10 * MB)
    assert (world.moves[-1].done, world.moves[-1].moved) == (True, 30 * MB)


@pytest.mark.parametrize("size", [0, 1, LEAST_BYTES - 1])
def test_small_payloads_make_no_noise(size: int) -> None:
    """Protects the log from a site that asks for little, often."""
    world = World()
    for _ in range(100):
        world.move(size, 0.1, Reference.of("global", "b" * 64, size))
    assert world.moves == []


def test_memory_is_bounded() -> None:
    """Protects the server from a site that begins and never ends."""
    world = World()
    for n in range(10 * MOST_MOVES):
        world.move(1, 0.1, Reference.of("node-7", f"{n:064x}", 40 * MB))
    assert len(world.meter._moves) <= MOST_MOVES
