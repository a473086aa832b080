"""Files that are seen whole or not at all, and locks."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flwr_hpc.files import draft, lock, publish, read_json, try_lock

HOLD = """
import sys, time
from pathlib import Path
from flwr_hpc.files import lock
with lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_failed_draft_leaves_what_was_there(tmp_path: Path) -> None:
    """Protects readers from half a file, and a disk from the drafts of writers that failed."""
    path = tmp_path / "folder" / "a.json"
    publish(path, '{"a": 1}')

    def fail() -> None:
        with draft(path) as temporary:
            temporary.write_text('{"a":')
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_what_is_synced_is_the_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a power failure: the bytes are on the disk before the name is, and the name
    before `publish` returns."""
    order: list[str] = []
    monkeypatch.setattr("os.fsync", lambda fd: order.append("sync"))
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("rename"), replace(self, to))[1]
    )
    publish(tmp_path / "a", b"x")
    assert order == ["sync", "rename", "sync"]


def test_a_killed_process_lets_go_of_its_lock(tmp_path: Path) -> None:
    """Protects a site from a launcher that was killed with -9."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with open(tmp_path / "lock") as file:
        assert not try_lock(file)
        holder.kill()
        holder.wait()
        assert try_lock(file)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects sites on parallel file systems that are mounted without locks: the lock holds
    among the processes of the host."""
    flock, locked = fcntl.flock, []

    def without(file: Any, how: int) -> None:
        if Path(file.name).is_relative_to(tmp_path):
            raise OSError(errno.ENOLCK, "No locks available")
        locked.append(file.name)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", without)
    with lock(tmp_path), open(locked[0]) as other, pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "lock") as file:
        assert try_lock(file)  # counts as free
