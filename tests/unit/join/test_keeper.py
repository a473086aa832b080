"""A site's process on a host: found again, followed, ended, whoever has started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from worlds.jobs import command_line, until

from flwr_hpc.join import keeper

STAY = "import time; time.sleep(3600)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ein Ort").mkdir()
    return tmp_path / "ein Ort"


@pytest.fixture
def process(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that the folder names as its site."""
    with subprocess.Popen([sys.executable, "-c", STAY, "hold", str(folder)]) as process:
        # Linux lets the parent go on before a new program's command line can be read.
        until(lambda: "hold" in command_line(psutil.Process(process.pid)), folder)
        _held(folder, process.pid)
        yield process
        process.kill()


def _held(folder: Path, pid: int, host: str | None = None) -> None:
    held = {"pid": pid, "host": host or keeper._host()}
    (folder / keeper.HELD).write_text(json.dumps(held))


def test_a_site_is_known_by_its_command_and_not_by_its_number(
    folder: Path, process: subprocess.Popen[bytes]
) -> None:
    """Protects from taking another process, with a number given anew, for the site."""
    assert keeper.look(folder)["state"] == "running"
    _held(folder, os.getpid())
    assert keeper.look(folder)["state"] == "ended"
    assert keeper.look(folder.parent)["state"] == "none"


def test_no_second_site_is_started(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Protects from two sites with one key, here or on another login node."""
    assert keeper.start(folder, "invitation.json")["state"] == "running"
    _held(folder, 1, "another-login-node")
    found = keeper.start(folder, "invitation.json")
    assert (found["state"], found["host"]) == ("elsewhere", "another-login-node")
    assert not (folder / keeper.LOG).exists()


def test_a_site_is_ended(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Protects from what goes on although nobody wants it."""
    assert keeper.end(folder) == {
        "state": "running",
        "host": keeper._host(),
        "code": None,
        "left": "",
    }
    assert process.wait() == -signal.SIGTERM  # it may be on its way out still
    assert keeper.end(folder)["state"] == "ended"


def test_what_a_site_writes_is_handed_on_to_its_end(folder: Path) -> None:
    """Protects who waits for a site that could not begin: its words, and its exit code."""
    command = [sys.executable, "-m", "flwr_hpc.join.keeper"]
    path = str(folder / "no invitation.json")
    done = subprocess.run([*command, "start", str(folder), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for offset in (0, 4):  # from the beginning, and from the middle
        follow = [*command, "follow", str(folder), str(offset)]
        lines = subprocess.run(follow, capture_output=True, text=True).stdout.splitlines()
        *said, last = [json.loads(line) for line in lines]
        assert last == {"code": 2}
        assert said[0]["line"] == f"error: the invitation {path} cannot be read: "[offset:] + (
            f"[Errno 2] No such file or directory: {path!r}"
        )
        assert said[-1]["offset"] == (folder / keeper.LOG).stat().st_size


def test_only_an_earlier_connections_end_is_ended(folder: Path) -> None:
    """Protects every other process of the user's from the number in a file."""
    (folder / keeper.LINE).write_text(json.dumps({"pid": os.getppid(), "host": keeper._host()}))
    assert keeper.release(folder) == {"released": 0}
