"""The live view of a run that somebody else keeps."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from flwr_hpc import watch
from flwr_hpc.config.compose import compose_config
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.tracking.events import EventLog


def test_it_shows_what_happens_and_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects whoever looks in from another terminal: news is shown, the run's end ends it."""
    run = RunDir.create(compose_config([f"run_dir={tmp_path}/run"]))
    driver = ExitStack()
    driver.enter_context(run.lock())

    def time_passes(_: float) -> None:
        with EventLog(run.events, join=True) as events:
            events.emit("site_online", facility="lumi")
        driver.close()

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=time_passes))
    assert watch.main([str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "lumi: site online" in said
    assert "nobody works on" in said


def test_leaving_it_leaves_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the run from Ctrl-C in the wrong terminal."""
    run = RunDir.create(compose_config([f"run_dir={tmp_path}/run"]))

    def ctrl_c(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=ctrl_c))
    with run.lock():
        assert watch.main([str(run.path)]) == 0
        assert run.in_use()


def test_what_is_no_run_directory_is_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects from a traceback."""
    assert watch.main([str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_a_run_may_be_on_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects folders whose names look like a host's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs:old").mkdir()
    assert watch._place("far:runs/x y") == ("far", "runs/x y")
    assert watch._place("runs:old") == ("", "runs:old")
    assert watch._place("/data/a:b") == ("", "/data/a:b")
