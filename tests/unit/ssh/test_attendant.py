"""The line to a site: lost and met again, said once, and nothing asked of who cannot be reached."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

from worlds.clock import FakeClock

from flwr_hpc.errors import UserError
from flwr_hpc.ssh.attendant import PAUSES_S, Attendant, Attendants
from flwr_hpc.ssh.host import SshHost, SshLostError

RUNNING = {"state": "running", "host": "uan01", "code": None}
SAYS = "import sys; sys.stdout.write(sys.argv[1])"


class FakeHost:
    """Can be reached or not, as the test says."""

    name = "far"

    def __init__(self, tries: list[str]) -> None:
        self.tries, self.connected, self.closed = tries, False, False

    def open(self, ask: bool) -> None:
        assert not ask
        why = self.tries.pop(0) if self.tries else ""
        self.connected = not why
        if why:
            raise SshLostError(why)

    def is_open(self) -> bool:
        return self.connected

    def abort(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class FakeSite:
    """Writes what the test says, one list for each time that it is followed."""

    name = "lumi"

    def __init__(self, tries: list[str], says: list[str], fault: str = "") -> None:
        self._host = FakeHost(tries)
        self.host = cast(SshHost, self._host)
        self.says, self.fault = says, fault
        self.ports: list[int] = []
        self.read = 0
        self.ended = 0

    def attach(self, port: int) -> dict[str, Any]:
        self.ports.append(port)
        if self.fault:
            raise UserError(self.fault)
        return RUNNING

    def follow(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SAYS, self.says.pop(0)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    def read_to(self, offset: int) -> None:
        self.read = offset

    def end(self) -> str:
        self.ended += 1
        return "its site and jobs are ended"


OVER = '{"line": "[   1.0 s] 1 jobs, 0.02 node-hours", "offset": 30}\n{"code": 0}\n'
CUT = 'motd of the host\n{"line": "training: {}", "offset": 9}\n'


def _attended(site: FakeSite, log: Path, clock: FakeClock | None = None) -> Attendant:
    """Attend a site to its end."""
    one = Attendant(site, log / "site.log", "flwr_hpc.run end=RUN", clock or FakeClock())
    one.start(8443)
    assert one._thread is not None
    one._thread.join(600)
    assert not one._thread.is_alive()
    return one


def test_a_line_is_met_again_by_itself(tmp_path: Path) -> None:
    """Protects a run behind a bad line: tried at growing intervals, each reason said once, what the
    site has written read on where it was."""
    site = FakeSite(["no route", "no route", "", "denied. To connect, type: ssh"], [CUT, OVER])
    clock = FakeClock()
    one = _attended(site, tmp_path, clock)
    assert one.notes() == [
        "no route",
        "its site runs on uan01, by ssh far",
        "the line is lost; its jobs go on, and it is tried again",
        "denied. To connect, type: ssh",
        "its site runs on uan01, by ssh far",
        "1 jobs, 0.02 node-hours",
    ]
    assert (site.ports, site.read, one.over) == ([8443, 8443], 30, True)
    assert clock.time >= PAUSES_S[0] + PAUSES_S[1]
    assert "training: {}" in (tmp_path / "site.log").read_text()
    assert (one.finish(finished=True), site.ended) == ("", 0)


def test_a_connection_that_a_person_opens_is_taken_at_once(tmp_path: Path) -> None:
    """Protects who has typed the command: nobody waits for the next try."""
    site, clock = FakeSite(["denied"] * 9, [OVER]), FakeClock()
    typed_at = sum(PAUSES_S[:5]) + 3

    def typed() -> None:
        site._host.tries.clear()
        site._host.connected = True

    clock.at[typed_at] = typed
    _attended(site, tmp_path, clock)
    assert clock.time < typed_at + 2


def test_what_a_site_refuses_ends_the_run(tmp_path: Path) -> None:
    """Protects from waiting for a site that cannot begin: its own words."""
    no = '{"line": "error: facilities.lumi.account must be given", "offset": 9}\n{"code": 2}\n'
    one = _attended(FakeSite([], [no]), tmp_path)
    assert one.fault.endswith("could not be started: facilities.lumi.account must be given")
    one = _attended(FakeSite([], [], fault="has no flwr-hpc"), tmp_path)
    assert Attendants([one], 1).fault == "lumi: has no flwr-hpc"


def test_a_site_that_died_is_started_again(tmp_path: Path) -> None:
    """Protects from a login node that was restarted."""
    site = FakeSite([], ['{"code": 143}\n', '{"code": 1}\n', OVER])
    one = _attended(site, tmp_path)
    assert len(site.ports) == 3
    assert sum("starting it again" in note for note in one.notes()) == 2


def test_nothing_is_asked_of_a_host_that_cannot_be_reached(tmp_path: Path) -> None:
    """Protects Ctrl-C from hanging: what was left, and how to end it."""
    site, clock = FakeSite(["no route"] * 99, []), FakeClock()
    one = Attendant(site, tmp_path / "site.log", "flwr_hpc.run end=RUN", clock)
    attendants = Attendants([one], 8443)
    assert list(attendants.finish(finished=False)) == []  # nothing was started
    clock.on_sleep = one._stop.set
    attendants.start()
    last = [note for _, note in attendants.finish(finished=False)][-1]
    assert last == (
        "far cannot be reached: its site, and its jobs, go on there. "
        "End them with: flwr_hpc.run end=RUN"
    )
    assert (site.ended, site._host.closed) == (0, True)


def test_a_site_within_reach_is_ended(tmp_path: Path) -> None:
    """Protects the budget of who presses Ctrl-C."""
    site = FakeSite([], [CUT])
    clock = FakeClock()
    one = Attendant(site, tmp_path / "site.log", "", clock)
    clock.on_sleep = one._stop.set
    one.start(1)
    assert one._thread is not None
    one._thread.join(600)
    assert (one.finish(finished=False), site.ended) == ("its site and jobs are ended", 1)
