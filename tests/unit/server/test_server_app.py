"""What the ServerApp says of its end: the driver goes by it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flwr_hpc.config.compose import compose_config
from flwr_hpc.server import server_app
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.tracking.events import read


def ended_by(error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what a ServerApp says whose training ends so."""

    def train(*_: Any) -> None:
        raise error

    run = RunDir.create(compose_config([f"run_dir={folder}"]))
    monkeypatch.setattr(server_app, "train", train)
    monkeypatch.setattr(server_app, "_log_to", lambda path: None)
    context: Any = SimpleNamespace(run_config={"run-dir": str(run.path)})
    with pytest.raises(type(error)):
        server_app.main(cast(Any, None), context)
    return [str(event["error"]) for event in read(run.events) if event["event"] == "run_finished"]


def test_an_error_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from trying a strategy's mistake again and again."""
    said = ended_by(ValueError("odd shapes"), tmp_path / "run", monkeypatch)
    assert said == ["ValueError: odd shapes"]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(1)], ids=["signal", "exit"])
def test_a_process_that_is_ended_ends_no_run(
    end: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a run whose SuperLink was started anew, and ends the ServerApp of before: twice, of
    which the second time was taken for the run's failure."""
    assert ended_by(end, tmp_path / "run", monkeypatch) == []
