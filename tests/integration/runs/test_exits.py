"""Every way out of the command: nothing is left behind, and the user knows what to do."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from worlds.jobs import until
from worlds.runs.run import ONE_SITE, ROOT, Run


def test_ctrl_c_during_start_up(tmp_path: Path) -> None:
    """Protects an impatient user: twice Ctrl-C before the first site is there."""
    run = Run(tmp_path / "run", settings=ONE_SITE)
    run.until(lambda: run.find("flower-supernode", str(run.dir)))
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    assert run.left_behind() == []
    assert "resume=" in run.said()
    assert "Traceback" not in run.said()


def test_sigterm_while_a_job_starts(tmp_path: Path) -> None:
    """Protects a login node that ends our processes: the jobs go too."""
    run = Run(tmp_path / "run", settings=ONE_SITE)
    run.until(lambda: run.ranks("local_a"))
    run.process.terminate()
    assert run.end() == 128 + signal.SIGTERM
    assert run.left_behind() == []
    assert run.summary()["status"] == "interrupted"


def test_reader_goes_away(tmp_path: Path) -> None:
    """Protects a run whose output nobody reads any more (`| head -1`)."""
    settings = [*ONE_SITE, "train.steps=20", "rounds=1", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "flwr_hpc.run", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        until(lambda: process.poll() is not None, tmp_path / "run")
    assert process.returncode == 0
    assert Run.summary_of(tmp_path / "run")["status"] == "finished"


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    """Protects a run from a second driver."""
    run = Run(tmp_path / "run", settings=ONE_SITE)
    run.until(lambda: (run.dir / "lock").exists() and (run.dir / "flower").exists())
    second = Run(tmp_path / "run", resume=True)
    assert second.end() == 2
    assert "in use" in second.said()
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
