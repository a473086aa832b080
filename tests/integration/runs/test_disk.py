"""A full or read-only disk, early in a run and in its middle: waited for, told, gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.hosts.disk import small_disk
from worlds.runs.run import ONE_SITE, Run, kill

pytestmark = pytest.mark.slow


def _troubles(run: Run) -> list[str]:
    return [e["reason"] for e in run.events("site_trouble") if e["reason"]]


def test_a_working_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Protects retries, before the first job and while it trains: the site is blocked, says why,
    and goes on once there is space; no order is failed, nothing is lost."""
    with small_disk(tmp_path / "disk", 64) as disk:
        disk.remount("ro")
        where = f"facilities.local_a.workdir={disk.path}"
        run = Run(tmp_path / "run", where, "train.steps=60", settings=ONE_SITE)
        run.until(lambda: _troubles(run))
        disk.remount("rw")
        run.until_training("local_a", workdir=disk.path)
        before = len(_troubles(run))
        disk.fill()
        run.until(lambda: _troubles(run)[before:])
        disk.empty()
        assert run.end() == 0, run.said()
        assert "cannot be written" in run.said()
        assert "local_a: goes on" in run.said()
        assert run.events("order_failed") == []
        assert run.summary()["facilities"]["local_a"]["steps"] == 120


def test_a_full_disk_while_a_session_is_started_anew(tmp_path: Path) -> None:
    """Protects a run whose disk is full when Flower has to be started again: it waits for it."""
    with small_disk(tmp_path / "disk", 64) as disk:
        run = Run(disk.path / "run", "train.steps=60", settings=ONE_SITE, output=tmp_path / "said")
        run.until_training("local_a")
        disk.fill()
        kill(run.children("flower-superlink")[0].pid)
        run.until(lambda: f"superlink ended; {run.dir} cannot be written" in run.said())
        disk.empty()
        assert run.end() == 0, run.said()
        assert "starting from the last aggregation" in run.said()
        assert run.summary()["facilities"]["local_a"]["steps"] == 120
