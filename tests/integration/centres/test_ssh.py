"""One command trains one model at a site of this machine and at one behind SSH."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file
from worlds.hosts.stranger import open_to_others
from worlds.jobs import until
from worlds.network.sshd import Sshd, needs_sshd, sshd
from worlds.runs.over_ssh import SshRun
from worlds.runs.run import ROOT, Run, kill, trained_steps

pytestmark = [pytest.mark.slow, needs_sshd]


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Sshd]:
    with sshd(tmp_path / "ein Übergang") as server:
        yield server


def test_a_line_cut_while_training_changes_no_bit(
    far: Sshd, tmp_path: Path, undisturbed: Run
) -> None:
    """Protects a run of days from a line of hours: the site is met again by itself, at the port
    that it knows, its work is neither lost nor done twice, and the model is as of one machine."""
    run = SshRun(tmp_path / "ein Lauf" / "one", far)
    run.until(run.trains_there)
    before = run.line()
    assert before is not None
    kill(before.pid)
    run.until(lambda: (line := run.line()) is not None and line.pid != before.pid)
    assert run.end() == 0, run.said()
    notes = [e["note"] for e in run.events("site_note")]
    assert any("line is lost" in note for note in notes)
    assert sum("its site runs on" in note for note in notes) == 2
    assert (run.jobs_there(), trained_steps(far.home)) == (["a0000"], 300)
    same, other = (load_file(r.dir / "model" / "model.safetensors") for r in (undisturbed, run))
    assert same.keys() == other.keys()
    assert all((same[name] == other[name]).all() for name in same)
    assert open_to_others(run.dir, run.there) == {}
    assert (run.left_behind(), run.left_there(), run.line()) == ([], [], None)


def _type(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_what_cannot_be_reached_is_left_and_met_again(far: Sshd, tmp_path: Path) -> None:
    """Protects jobs at a host behind a line that is down: Ctrl-C says what was left there, resume
    goes on with it, and end= leaves nothing."""
    run = SshRun(tmp_path / "ein Läufer" / "two", far, "detach=true")
    assert run.process.wait() == 0, run.said()
    assert f"flwr_hpc.run end={shlex.quote(str(run.dir))}" in run.said()
    until(run.trains_there, run.dir, far.home, explain=run.said)
    _watched(far, run)
    site = _site(run)
    far.refuse()
    os.kill(int((run.dir / "lock").read_text()), signal.SIGINT)
    output = run.dir / "logs" / "run.log"
    until(lambda: "stopped by SIGINT" in output.read_text(), run.dir, explain=output.read_text)
    assert "its site, and its jobs, go on there. End them with: " in output.read_text()
    assert psutil.pid_exists(site)

    far.start()
    again = SshRun(run.dir, far, resume=True)
    again.until(lambda: [e for e in run.events("site_note") if "its site runs" in e["note"]][1:])
    assert _site(run) == site
    again.until(lambda: run.events("run_started")[1:])
    ended = _type("flwr_hpc.run", f"end={run.dir}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert again.process.wait() == 128 + signal.SIGTERM
    assert len(run.jobs_there()) == 1
    until(lambda: not [*run.left_behind(), *run.left_there()], run.dir, far.home)
    until(lambda: run.line() is None, run.dir, far.home)


def _site(run: SshRun) -> int:
    return int(json.loads((run.there / "held.json").read_text())["pid"])


def _watched(far: Sshd, run: SshRun) -> None:
    """Look at the run from elsewhere, leave, and see that it goes on."""
    options = ["--python", sys.executable, "--ssh-config", str(far.config)]
    command = [sys.executable, "-m", "flwr_hpc.watch", f"far:{run.dir}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as watch:
        assert watch.stdout is not None
        os.set_blocking(watch.stdout.fileno(), False)
        seen = b""

        def shown() -> bool:
            nonlocal seen
            seen += watch.stdout.read() or b""  # type: ignore[union-attr]
            return b"local_b" in seen

        until(shown, run.dir, far.home, explain=lambda: seen.decode(errors="replace"))
        watch.send_signal(signal.SIGINT)
    assert psutil.pid_exists(int((run.dir / "lock").read_text()))
