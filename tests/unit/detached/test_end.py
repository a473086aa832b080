"""`run end=RUN_DIR`: what still goes on is ended, and what cannot be is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from worlds.runs.run import ROOT

from flwr_hpc import run as command
from flwr_hpc.config.compose import compose_config
from flwr_hpc.detached import end as module
from flwr_hpc.errors import UserError
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.ssh.host import SshLostError
from flwr_hpc.ssh.remote_site import Memory

DRIVER = """
import sys, time
from flwr_hpc.server.run_dir import RunDir
with RunDir.open(sys.argv[1]).lock():
    print("works", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(compose_config([f"run_dir={tmp_path}/run", "+facility=local_a"]))


def test_a_run_that_goes_on_is_stopped(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects who has detached a run, and has no terminal with it."""
    words = [sys.executable, "-c", DRIVER, str(run.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"works\n"
        assert command.main([f"end={run.path}"]) == 0
        assert driver.wait() == -15
    said = capsys.readouterr().out
    assert f"its process ({driver.pid}) has been stopped" in said
    assert "local_a: no job of the run is left" in said


class _Site:
    """A site that was started, on a host that the test describes."""

    name, by_hand = "lumi", "python -m flwr_hpc.join.keeper end /folder"

    def __init__(self, error: Exception | None, folder: str = "/folder") -> None:
        self.error, self.known, self.host = error, Memory(folder=folder), self

    def open(self, ask: bool) -> None:
        assert ask
        if self.error:
            raise self.error

    def end(self) -> str:
        return "its site and jobs are ended"

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("site", "code", "words"),
    [
        (_Site(None), 0, "lumi: its site and jobs are ended"),
        (_Site(SshLostError("no route"), folder=""), 0, "lumi: nothing was started there"),
        (_Site(SshLostError("lumi cannot be reached: no route")), 1, "on that host: python -m"),
        (_Site(UserError("no Python there")), 1, "lumi: no Python there"),
    ],
)
def test_sites_on_other_hosts(
    site: _Site,
    code: int,
    words: str,
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Protects from believing that nothing is left where nobody could look."""
    sites: list[Any] = [site]
    monkeypatch.setattr(module, "remote_sites", lambda *_: sites)
    assert command.main([f"end={run.path}"]) == code
    assert words in capsys.readouterr().out


def test_it_stands_alone(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects a run from being ended by who wanted to change it."""
    assert command.main([f"end={run.path}", "rounds=9"]) == 2
    assert "end= stands alone" in capsys.readouterr().err
