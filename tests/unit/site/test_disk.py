"""A working folder that is full or read-only: waited for and told, and jobs end without it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from worlds.clock import FakeClock
from worlds.hosts.disk import SmallDisk, small_disk
from worlds.site.world import Killed, World, order
from worlds.strategies.grid import name_this_process

from flwr_hpc import protocol
from flwr_hpc.clock import SystemClock
from flwr_hpc.config.compose import compose_config
from flwr_hpc.files import disk_trouble, is_disk_trouble
from flwr_hpc.protocol import Status
from flwr_hpc.server.progress import DISK_EVERY_S, DiskWatch
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.sites import site_settings
from flwr_hpc.site import client_app
from flwr_hpc.site.launcher import make_site
from flwr_hpc.site.long_poll import once_writable


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as made:
        yield made


def spoil(disk: SmallDisk, how: str) -> None:
    if how == "full":
        disk.fill()
    else:
        disk.remount("ro")


def mend(disk: SmallDisk, how: str) -> None:
    if how == "full":
        disk.empty()
    else:
        disk.remount("rw")


BAD = pytest.mark.parametrize("how", ["full", "ro"])


@BAD
def test_what_cannot_be_written_is_waited_for(disk: SmallDisk, how: str) -> None:
    """Protects retries: the site answers that it is blocked, says why, and goes on by itself."""
    world = World(disk.path / "site")
    spoil(disk, how)
    clock = FakeClock()
    blocked = once_writable(world.site.acquire, 20.0, clock, disk.path)
    assert blocked.state == "blocked"
    assert "the run waits" in blocked.reason
    assert str(disk.path) in blocked.reason
    assert clock.time == 20.0
    assert world.scheduler.jobs == {}
    clock.at[32.0] = lambda: mend(disk, how)
    assert once_writable(world.site.acquire, None, clock, disk.path).state == "queued"
    assert len(world.scheduler.jobs) == 1
    assert world.alloc(0).settings() == {"model": "tiny"}


def test_no_job_without_its_settings(tmp_path: Path) -> None:
    """Protects from a disk that fills up between an allocation's folder and its settings."""
    world = World(tmp_path / "site")
    world.alloc(0).path.mkdir(parents=True)
    assert world.site.acquire().allocation == "a0000"
    assert world.alloc(0).settings() == {"model": "tiny"}


@BAD
@pytest.mark.parametrize("moment", ["running", "not written down", "just submitted"])
def test_jobs_are_cancelled_without_the_disk(disk: SmallDisk, how: str, moment: str) -> None:
    """Protects the user's budget: neither lock nor record can be written, nor could they be
    when the job was submitted."""
    world = World(disk.path / "site")
    if moment == "running":
        world.site.acquire()
        world.up(0)
    else:
        world.scheduler.trouble = Killed()
        with pytest.raises(Killed):
            world.site.acquire()
        world.scheduler.trouble = None
        world.clock.time += 3600.0 * (moment == "not written down")
        if moment == "just submitted":
            world.job(0, "running")
    spoil(disk, how)
    world.restart().cancel_all()
    assert world.scheduler.cancelled == ["run-fac-a0000"]


def test_a_folder_that_never_was_holds_no_jobs(disk: SmallDisk) -> None:
    """Protects the end of a run whose sites could not even begin."""
    disk.fill()
    World(disk.path / "site").site.cancel_all()
    disk.remount("ro")
    World(disk.path / "other").site.cancel_all()


def test_an_allocation_lost_to_the_disk_costs_no_retry(tmp_path: Path) -> None:
    """Protects a nearly full disk: small files fit, weights do not. The next allocation comes
    after a pause that grows, and nothing is counted."""
    world = World(tmp_path / "site")
    world.restart(retries=0)
    world.site.submit(order(), None)
    for number in range(8):
        world.up(number)
        world.worker(number, "failed", error="No space left on device", disk=True)
        began = world.clock.time
        answer = once_writable(lambda: world.site.collect(order().id), None, world.clock, tmp_path)
        assert answer.state == "queued"
        assert answer.allocation == f"a{number + 1:04d}"
        pause = world.clock.time - began
        assert min(60.0 * 2**number, 1800.0) <= pause <= min(60.0 * 2**number, 1800.0) + 5.0


def test_other_errors_are_not_waited_for(tmp_path: Path) -> None:
    """Protects from waiting for what no space mends."""

    def denied() -> Status:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        once_writable(denied, None, SystemClock(), tmp_path)


@BAD
def test_the_driver_says_so(disk: SmallDisk, how: str) -> None:
    """Protects from silence: on a full disk no log tells anything. Once, and its end."""
    clock = FakeClock()
    watch = DiskWatch(disk.path, clock)
    assert watch.poll() == ""
    spoil(disk, how)
    told = []
    for _ in range(3):
        clock.sleep(DISK_EVERY_S)
        told.append(watch.poll())
    assert [bool(line) for line in told] == [True, False, False]
    assert "the run waits" in told[0]
    mend(disk, how)
    clock.sleep(DISK_EVERY_S)
    assert watch.poll().endswith("can be written again")
    assert list(disk.path.glob(".probe*")) == []


def test_quota_is_disk_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects users of shared file systems, where the quota ends before the disk does."""
    assert is_disk_trouble(OSError(errno.EDQUOT, "Disk quota exceeded"))

    def over(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "write_bytes", over)
    assert "Disk quota exceeded" in disk_trouble(tmp_path)


@pytest.mark.parametrize(("kind", "wait", "patience"), [
    ("query.describe", None, 0.0), ("query.release", {"cancel": True}, 0.0),
    ("query.acquire", {"wait_s": 20.0}, 20.0), ("train", {"wait_s": 0.0}, 0.0),
    ("train", None, None), ("evaluate", None, None),
])  # fmt: skip
def test_how_long_a_message_is_held(
    kind: str, wait: dict[str, float] | None, patience: float | None
) -> None:
    """Protects the server from a site that cannot even say what it is; a strategy that knows
    nothing of long polls waits."""
    name_this_process()
    content = RecordDict({} if wait is None else {protocol.WAIT: ConfigRecord(wait)})
    assert client_app._patience_s(Message(content, 1, kind)) == patience


@BAD
def test_a_site_is_there_without_its_folder(disk: SmallDisk, how: str) -> None:
    """Protects what a site can do without writing: say that it is blocked, and cancel jobs."""
    config = compose_config(["+facility=local_a", f"facilities.local_a.workdir={disk.path}"])
    settings = site_settings(RunDir(disk.path / "run"), config, "local_a", "key")
    disk.fill()
    spoil(disk, how)
    site = make_site(settings)
    site.cancel_all()
    if how == "ro":
        answer = once_writable(site.status, 0.0, FakeClock(), disk.path)
        assert answer.state == "blocked"
