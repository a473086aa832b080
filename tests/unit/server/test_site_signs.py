"""What a site's folder shows of a reply that will not come."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from worlds.clock import FakeClock

from flwr_hpc.gate.credentials import Credential, write_credentials
from flwr_hpc.server import site_signs
from flwr_hpc.server.site_signs import ANSWERED_S, SILENT_S, UNBEGUN_S, SiteSigns, SuperNodeStarts
from flwr_hpc.site.presence import Presence
from flwr_hpc.spool import Answering, Spool
from flwr_hpc.tracking.events import EventLog


class Watched:
    """A site that works on messages, and the server that waits for the reply to one."""

    def __init__(self, root: Path) -> None:
        self.clock, self.spool = FakeClock(1000.0), Spool(root)
        self.signs = SiteSigns({"a": root}, self.clock)

    def says(self, message: str, beat: int = 0, answered: bool = False) -> None:
        self.spool.answering.write(Answering(message, "train", beat, answered))

    def lost_after(self, limit_s: float = 2000.0, beats: bool = False) -> tuple[float, str]:
        """Return after how long the reply to "m" counts as lost, and why."""
        sent_at = self.clock.now()
        while (waited := self.clock.now() - sent_at) < limit_s:
            if beats:
                self.says("m", beat=int(waited))
            if words := self.signs.lost("a", "m", sent_at):
                return waited, words
            self.clock.sleep(5.0)
        return limit_s, ""


@pytest.fixture
def site(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "site")


def test_a_clientapp_that_works_is_waited_for(site: Watched) -> None:
    """Protects long polls: as long as it gives signs, no time is too long."""
    assert site.lost_after(beats=True) == (2000.0, "")


def test_a_clientapp_that_died_is_noticed(site: Watched) -> None:
    """Protects a quarter of an hour: it began, and then gave no sign."""
    site.says("m", beat=3)
    waited, words = site.lost_after()
    assert SILENT_S < waited <= SILENT_S + 10
    assert "its ClientApp died" in words


def test_an_answer_that_got_lost_is_noticed(site: Watched) -> None:
    """Protects from a reply that left the site and never came: its SuperNode was killed."""
    site.says("m", answered=True)
    waited, words = site.lost_after()
    assert ANSWERED_S < waited <= ANSWERED_S + 10
    assert "the site answered" in words


def test_a_message_that_nobody_began_is_noticed(site: Watched) -> None:
    """Protects from ClientApps that die before a line of ours runs."""
    site.says("earlier", answered=True)
    waited, words = site.lost_after()
    assert UNBEGUN_S < waited <= UNBEGUN_S + 10
    assert "no ClientApp began" in words


def test_a_site_elsewhere_is_left_to_the_time(site: Watched, tmp_path: Path) -> None:
    """Protects sites whose folder the server does not see."""
    assert site.lost_after() == (2000.0, "")
    assert SiteSigns({}, site.clock).lost("a", "m", 0.0) == ""


def test_a_full_disk_is_no_silence(site: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a site that waits for its disk: it cannot write that it lives."""
    site.says("m")
    monkeypatch.setattr(site_signs, "disk_trouble", lambda folder: "full")
    assert site.lost_after() == (2000.0, "")


def test_a_clientapp_says_what_it_does(site: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the signs themselves: begun, alive, answered, also when its work fails."""
    monkeypatch.setattr("flwr_hpc.site.presence.BEAT_S", 0.01)
    with suppress(ValueError), Presence(site.spool, "m", "train") as presence:
        first = site.spool.answering.read()
        while (record := site.spool.answering.read()) is not None and record.beat < 2:
            presence._thread.join(0.01)
        raise ValueError("bad")
    assert first is not None
    assert (first.message, first.kind, first.answered) == ("m", "train", False)
    last = site.spool.answering.read()
    assert last is not None
    assert last.answered


def test_supernodes_that_the_gate_saw_start_are_told_once(tmp_path: Path) -> None:
    """Protects what a dead SuperNode held: each start is told of once, by its node; those of an
    earlier session, and other events, are none."""
    credentials, path = tmp_path / "credentials.json", tmp_path / "events.jsonl"
    write_credentials(credentials, {s: Credential("", "", "", n) for n, s in ((7, "a"), (8, "b"))})
    with EventLog(path) as log:
        log.emit("supernode_started", facility="a")
        starts = SuperNodeStarts(path, credentials)
        assert starts.nodes() == set()
        log.emit("site_online", facility="a")
        log.emit("supernode_started", facility="b")
        log.emit("supernode_started", facility="revoked and forgotten")
    assert starts.nodes() == {8}
    assert starts.nodes() == set()
