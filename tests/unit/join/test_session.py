"""How a site leaves a run that is over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flwr_hpc.join import session
from flwr_hpc.join.server_door import Away, NotInvited
from flwr_hpc.spool import LeftOut, Spool


class Server:
    """Answers so many questions, then no more; time passes only between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: int, end: Exception) -> None:
        self.asked, self.now = 0, 0.0
        self._answers, self._end = answers, end
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        monkeypatch.setattr(session, "time", clock)
        monkeypatch.setattr(session.server_door, "ask", self._ask)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _ask(self, invitation: Any) -> dict[str, Any]:
        self.asked += 1
        if self.asked > self._answers:
            raise self._end
        return {}


@pytest.fixture(params=[Away("refused"), NotInvited("revoked")], ids=["away", "revoked"])
def end(request: pytest.FixtureRequest) -> Exception:
    return request.param  # type: ignore[no-any-return]


def test_a_site_leaves_after_its_server(monkeypatch: pytest.MonkeyPatch, end: Exception) -> None:
    """Protects the end of a run from half a minute's wait for an answer that was never sent."""
    server = Server(monkeypatch, 3, end)
    session._take_leave(SimpleNamespace())  # type: ignore[arg-type]
    assert server.asked == 4


def test_a_server_that_stays_is_left(monkeypatch: pytest.MonkeyPatch, end: Exception) -> None:
    """Protects a centre from a server that waits for another one."""
    server = Server(monkeypatch, 10**9, end)
    session._take_leave(SimpleNamespace())  # type: ignore[arg-type]
    assert session.LEAVE_S <= server.now < session.LEAVE_S + 1


def test_its_people_are_told_once_that_the_run_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Protects a centre from waiting for a run that its own limit, or its scheduler, keeps it out
    of; the server alone was told."""
    spool, told, slept = Spool(tmp_path), list[str](), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        spool.left_out.write(LeftOut("more than the site allows"))
        if len(slept) == 4:
            spool.released.touch()

    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep))
    processes = SimpleNamespace(tend=list, restarts=0)
    watch = SimpleNamespace(poll=lambda in_doubt: None)
    view = SimpleNamespace(update=lambda events: None, print_line=told.append)
    parts: list[Any] = [processes, spool, watch, view, SimpleNamespace(poll=list)]
    session._follow(*parts, str)
    assert told == ["the run goes on without this site: more than the site allows"]
