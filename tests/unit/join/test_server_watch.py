"""What a site's people are told of a server that is away, and when the site is out."""

from __future__ import annotations

import pytest
from worlds.clock import FakeClock

from flwr_hpc.config.invitation import versions
from flwr_hpc.errors import UserError
from flwr_hpc.join.server_door import Away, NotInvited
from flwr_hpc.join.server_watch import ASK_S, DOUBT_S, ServerWatch


class World:
    """A server whose answers are scripted, and a site that spends until it rests."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.no: Exception | None = None
        self.asked, self.rest = 0, ""
        self.said: list[str] = []
        self.watch = ServerWatch(self._ask, lambda: self.rest, self.said.append, self.clock)

    def _ask(self) -> dict[str, object]:
        self.asked += 1
        if self.no is not None:
            raise self.no
        return {"versions": versions()}

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(2 * seconds)):
            self.clock.sleep(0.5)
            self.watch.poll()


def test_a_server_that_is_away_is_told_with_what_goes_on_and_what_was_spent() -> None:
    """Protects a centre's people from a night's silence, and from a line a minute."""
    world = World()
    world.pass_time(5 * ASK_S)
    assert (world.asked, world.said) == (5, [])
    world.no = Away("refused")
    world.pass_time(5 * ASK_S)
    (away,) = world.said
    assert "cannot be reached (refused)" in away
    world.rest = "1 jobs, 0.50 node-hours"
    world.pass_time(5 * ASK_S)
    assert world.said[1:] == ["no job is left while the server is away: 1 jobs, 0.50 node-hours"]
    world.no = None
    world.pass_time(5 * ASK_S)
    assert world.said[2:] == ["the server is back after 10 min"]
    world.no = Away("refused")
    world.pass_time(2 * ASK_S)
    assert len(world.said) == 5  # it is told again the next time


def test_a_supernode_that_ends_is_a_reason_to_ask_at_once() -> None:
    """Protects a centre whose site was revoked from another minute's node-hours."""
    world = World()
    world.no = NotInvited("revoked")
    world.clock.sleep(1.0)
    world.watch.poll(in_doubt=True)  # asked a moment ago
    with pytest.raises(UserError, match="revoked"):
        world.pass_time(DOUBT_S)
    assert world.asked == 1


def test_a_server_of_another_version_is_no_server_of_ours() -> None:
    """Protects a run from a site that was updated, or a server, while it went on."""
    world = World()
    world.watch = ServerWatch(
        lambda: {"versions": versions() | {"flwr_hpc": "9"}}, str, world.said.append, world.clock
    )
    with pytest.raises(UserError, match="does not fit the server"):
        world.pass_time(ASK_S)
