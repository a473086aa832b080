"""A run directory that cannot be written: the ServerApp waits, and goes on from its checkpoint."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from worlds.clock import FakeClock
from worlds.hosts.disk import small_disk

from flwr_hpc.files import publish
from flwr_hpc.server import server_app
from flwr_hpc.server.progress import DiskWatch
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.tracking.events import EventLog, read


@pytest.mark.parametrize("how", ["full", "ro"])
def test_the_server_waits_for_its_disk(tmp_path: Path, how: str) -> None:
    """Protects a run from its own disk: no try is spent, and training begins anew, which is from
    the newest checkpoint, once something can be written."""
    with small_disk(tmp_path / "disk") as disk, EventLog(tmp_path / "events.jsonl") as events:
        disk.fill() if how == "full" else disk.remount("ro")
        clock = FakeClock()

        def mend() -> None:
            if len(clock.pauses) == 4:
                disk.empty() if how == "full" else disk.remount("rw")

        clock.on_sleep = mend
        tries: list[int] = []

        def train() -> None:
            tries.append(len(clock.pauses))
            publish(disk.path / "checkpoints" / "state.json", "{}" * 10_000)

        server_app._once_writable(RunDir(disk.path), events, clock, train)
        assert tries == [0, 4]
        assert (disk.path / "checkpoints" / "state.json").exists()
    (told,) = read(tmp_path / "events.jsonl")
    assert told["event"] == "disk_trouble"
    assert "goes on by itself" in told["reason"]


def test_other_errors_end_the_run(tmp_path: Path) -> None:
    """Protects from waiting for ever for a folder that somebody has removed."""

    def train() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    with EventLog(tmp_path / "events.jsonl") as events, pytest.raises(FileNotFoundError):
        server_app._once_writable(RunDir(tmp_path), events, FakeClock(), train)


def test_a_folder_that_is_away_ends_nothing(tmp_path: Path) -> None:
    """Protects a run from its own look: only what is known as full or read-only is told."""
    clock, folder = FakeClock(), tmp_path / "run"
    watch = DiskWatch(folder, clock)
    assert watch.poll() == ""
    folder.mkdir()
    clock.sleep(60.0)
    assert watch.poll() == ""
