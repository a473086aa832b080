"""Files that are seen whole or not at all, and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flwr_hpc.files import (
    draft,
    lock,
    private_files,
    private_folder,
    publish,
    read_json,
    try_lock,
)

HOLD = """
import sys, time
from pathlib import Path
from flwr_hpc.files import lock
with lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    assert os.umask(before) == 0o022


@pytest.mark.usefixtures("open_umask")
def test_published_files_and_folders_are_their_owners_alone(tmp_path: Path) -> None:
    """Protects secrets and weights from other users, whatever umask the user has."""
    publish(tmp_path / "a.json", "{}")
    assert mode(tmp_path / "a.json") == 0o600
    with private_files():
        publish(tmp_path / "folder" / "b.json", "{}")
        (tmp_path / "c").touch()
    assert [mode(tmp_path / name) for name in ("folder", "c")] == [0o700, 0o600]


@pytest.mark.usefixtures("open_umask")
def test_a_folder_that_was_there_is_closed_and_keeps_its_group(tmp_path: Path) -> None:
    """Protects runs in folders that the user made, and quotas that go by a folder's group."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new").chmod(0o2775)
    assert mode(private_folder(tmp_path / "new")) == 0o2700
    assert mode(private_folder(tmp_path / "deep" / "er")) == 0o700
    (tmp_path / "odd").mkdir(mode=0o500)
    assert mode(private_folder(tmp_path / "odd")) == 0o500


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
