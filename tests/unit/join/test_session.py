"""How a site leaves a run that is over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flwr_hpc.join import session
from flwr_hpc.join.server_door import Away, NotInvited


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
