"""A full or read-only disk, early in a run and in its middle: waited for, told, gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.disk import small_disk
from worlds.runs import Run, kill

SHORT = ("rounds=1", "train.steps=30")


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_working_folder_that_cannot_be_written(tmp_path: Path, how: str) -> None:
    """Protects retries: the site is blocked, says why, and goes on once there is space."""
    with small_disk(tmp_path / "disk", 64) as disk:
        disk.fill() if how == "full" else disk.remount("ro")
        run = Run(tmp_path / "run", f"facilities.local_a.workdir={disk.path}", *SHORT)
        run.until(lambda: [e for e in run.events("site_trouble") if e["reason"]])
        disk.empty() if how == "full" else disk.remount("rw")
        assert run.end() == 0, run.said()
        assert "cannot be written" in run.said()
        assert "local_a: goes on" in run.said()
        assert run.events("order_failed") == []
        assert run.summary()["facilities"]["local_a"]["steps"] == 30


def test_a_full_disk_while_orders_are_trained(tmp_path: Path) -> None:
    """Protects a run whose folder fills up: the worker's order is not failed, nothing is lost."""
    with small_disk(tmp_path / "disk", 64) as disk:
        run = Run(tmp_path / "run", f"facilities.local_a.workdir={disk.path}", "train.steps=60")
        run.until_training("local_a", workdir=disk.path)
        disk.fill()
        run.until(lambda: [e for e in run.events("site_trouble") if e["reason"]])
        disk.empty()
        assert run.end() == 0, run.said()
        assert run.summary()["facilities"]["local_a"]["steps"] == 120


def test_a_full_disk_while_a_session_is_started_anew(tmp_path: Path) -> None:
    """Protects a run whose disk is full when Flower has to be started again: it waits for it."""
    with small_disk(tmp_path / "disk", 64) as disk:
        run = Run(disk.path / "run", "train.steps=60", output=tmp_path / "said")
        run.until_training("local_a")
        disk.fill()
        kill(run.children("flower-superlink")[0].pid)
        run.until(lambda: f"superlink ended; {run.dir} cannot be written" in run.said())
        disk.empty()
        assert run.end() == 0, run.said()
        assert "starting from the last aggregation" in run.said()
        assert run.summary()["facilities"]["local_a"]["steps"] == 120
