"""How often, and how patiently, the driver starts Flower."""

from __future__ import annotations

import errno
import io
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from worlds.clock import FakeClock

from flwr_hpc import files
from flwr_hpc.config.schema import Config, FederationConfig
from flwr_hpc.flower import commands
from flwr_hpc.server import driver
from flwr_hpc.server.driver import SessionOutcome
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.tracking.live import LiveView


def _view() -> tuple[LiveView, io.StringIO]:
    out = io.StringIO()
    return LiveView(Console(file=out, width=200), 1), out


def _sessions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcomes: list[SessionOutcome], restarts: int
) -> tuple[SessionOutcome, list[float], str]:
    patience: list[float] = []

    def session(*args: Any) -> SessionOutcome:
        patience.append(args[-1])
        return outcomes.pop(0)

    monkeypatch.setattr(driver, "_session", session)
    config = Config(federation=FederationConfig(restarts=restarts))
    view, out = _view()
    return driver._sessions(RunDir(tmp_path), config, view), patience, out.getvalue()


def test_a_start_that_took_too_long_is_tried_again_with_more_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Protects a run on a slow login node, and says what it does."""
    slow = SessionOutcome("lost", "the ServerApp did not start within 90 s")
    good = SessionOutcome("finished")
    outcome, patience, said = _sessions(monkeypatch, tmp_path, [slow, slow, good], 2)
    assert outcome == good
    assert patience == [commands.START_S, 2 * commands.START_S, 4 * commands.START_S]
    assert said.count("did not start within 90 s; starting again") == 2


def test_tries_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects from trying for ever: the last words are the reason."""
    slow = SessionOutcome("lost", "SuperLink did not start")
    outcome, patience, _ = _sessions(monkeypatch, tmp_path, [slow] * 9, 1)
    assert outcome == slow
    assert len(patience) == 2


@pytest.mark.parametrize("ended", ["raised", "lost", "failed"])
def test_a_session_that_a_full_disk_ends_is_begun_anew_once_there_is_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ended: str
) -> None:
    """Protects a run whose disk fills up while Flower is started: no try is used up, and it says
    what it waits for."""
    disk, clock = ["full"], FakeClock()
    clock.at[100.0] = disk.clear
    for module in (driver, files):
        monkeypatch.setattr(module, "disk_trouble", lambda folder: "".join(disk))
    moments: list[float] = []

    def session(*args: Any) -> SessionOutcome:
        moments.append(clock.time)
        if not disk:
            return SessionOutcome("finished")
        if ended == "raised":
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "flower"))
        return SessionOutcome(ended, "superlink ended")

    monkeypatch.setattr(driver, "_session", session)
    view, out = _view()
    config = Config(federation=FederationConfig(restarts=0))
    assert driver._sessions(RunDir(tmp_path), config, view, clock).status == "finished"
    assert moments == [0.0, 105.0]
    assert out.getvalue().count("can be written again") == 1
    assert ("No space left" if ended == "raised" else "full") in out.getvalue()


def test_what_no_disk_explains_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Protects from waiting for ever: another error ends the session, and is told."""

    def session(*args: Any) -> SessionOutcome:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(driver, "_session", session)
    with pytest.raises(OSError, match="Permission denied"):
        driver._sessions(RunDir(tmp_path), Config(), _view()[0], FakeClock())


def test_a_second_ctrl_c_does_not_end_the_clean_up() -> None:
    """Protects an impatient user: what is left of Flower is ended before the command is."""
    with driver.signals():
        with pytest.raises(driver.Interrupted):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
