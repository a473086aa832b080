"""Allocations of real processes on this host, with a worker that needs no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from worlds import worker as fake_worker
from worlds.jobs import TESTS, command_line, processes_of, send, until

from flwr_hpc.clock import SystemClock
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.protocol import Order, Status
from flwr_hpc.schedulers.local.adapter import LocalScheduler
from flwr_hpc.site.manager import AllocationManager
from flwr_hpc.spool import Spool

FINAL = {"done", "failed"}


class Home:
    """A site in a folder; every call of `site` is like a new process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_key = uuid.uuid4().hex[:8]
        self.spec: dict[str, object] = {}

    def site(self, walltime: str = "01:00:00", **config: Any) -> AllocationManager:
        facility = FacilityConfig(
            scheduler="local", ranks_per_node=2, walltime=walltime, env={"PYTHONPATH": str(TESTS)}
        )
        return AllocationManager(
            Spool(self.root),
            self.run_key,
            "here",
            facility,
            AllocationConfig(**config),
            LocalScheduler(),
            self.spec,
            SystemClock(),
            entry=fake_worker.run,
        )

    def order(self, seq: int = 0, **options: object) -> Order:
        return Order(self.run_key, "here", seq, "train", steps=5, options=options)

    def name(self, number: int = 0) -> str:
        return f"{self.run_key}-here-a{number:04d}"

    def ranks(self, number: int = 0) -> list[psutil.Process]:
        return [p for p in processes_of(self.name(number)) if "_submit" in command_line(p)]

    def both_ranks(self) -> list[psutil.Process]:
        """Wait for them: that a worker is at work tells of rank 0 alone."""
        until(lambda: len(self.ranks()) == 2)
        return self.ranks()

    def controller(self) -> psutil.Process:
        job = json.loads((self.root / "allocations" / "a0000" / "job.json").read_text())
        return psutil.Process(int(job["id"]))

    def open_gate(self) -> None:
        """Let orders with a gate go on."""
        (self.root / fake_worker.GATE).touch()

    def trained(self) -> list[str]:
        return (self.root / "trained.log").read_text().splitlines()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "site")
    yield home
    for number in range(4):
        send(signal.SIGKILL, processes_of(home.name(number)))


def decided(site: AllocationManager, ask: Callable[[], Status], states: set[str]) -> Status:
    """Wait as the server does, message by message."""

    def look() -> Status | None:
        status = site.wait(ask, 5.0, states)
        return status if status.state in states else None

    status = until(look, site.spool.root)
    assert status is not None
    return status


def acquire(site: AllocationManager) -> Status:
    status = decided(site, site.acquire, {"ready", "failed"})
    assert status.state == "ready", status
    return status


def finish(site: AllocationManager, order: Order) -> Status:
    return decided(site, lambda: site.collect(order.id), FINAL)


def begun(home: Home, site: AllocationManager, order: Order) -> None:
    site.submit(order, None)
    until(lambda: site.collect(order.id).step > 0)


def test_one_allocation_for_many_orders(home: Home) -> None:
    """Protects warmth: the job lives on across orders and across launchers."""
    acquire(home.site())
    pids = {p.pid for p in home.both_ranks()}
    for seq in range(3):
        site = home.site()
        site.submit(home.order(seq), None)
        assert finish(site, home.order(seq)).state == "done"
    assert {p.pid for p in home.ranks()} == pids
    assert len(home.trained()) == 3


def test_job_survives_the_process_that_submitted_it(home: Home) -> None:
    """Protects running work from kill -9 of the ClientApp and its whole process group."""
    code = (
        "import sys, pathlib; from test_local_jobs_child import main;"
        "main(pathlib.Path(sys.argv[1]), sys.argv[2])"
    )
    helper = home.root.parent / "test_local_jobs_child.py"
    helper.write_text(
        "import time\n"
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('jobs_test', {__file__!r})\n"
        "jobs_test = importlib.util.module_from_spec(spec)\n"
        "sys.modules['jobs_test'] = jobs_test\n"
        "spec.loader.exec_module(jobs_test)\n"
        "def main(root, key):\n"
        "    home = jobs_test.Home(root)\n"
        "    home.run_key = key\n"
        "    home.site().submit(home.order(seconds=1, gate=1), None)\n"
        "    print('handed in', flush=True)\n"
        "    time.sleep(300)\n"
    )
    path = f"{helper.parent}:{TESTS}:{TESTS.parent}"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(home.root), home.run_key],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "handed in\n"
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.communicate()
    site = home.site()
    again = site.submit(home.order(seconds=1, gate=1), None)
    assert again.state in ("starting", "ready", "running")
    home.open_gate()
    assert finish(site, home.order()).state == "done"
    assert home.trained() == [f"{home.order().id} a0000"]


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank(home: Home, rank: int) -> None:
    """Protects an order from kill -9 of a rank: replaced, done, nothing left of the first."""
    site = home.site()
    begun(home, site, home.order(seconds=1, gate=1))
    ranks = home.both_ranks()
    victim = [p for p in ranks if p.environ()["SUBMITIT_LOCAL_LOCALID"] == str(rank)]
    victim[0].kill()
    home.open_gate()
    status = finish(site, home.order())
    assert status.state == "done"
    if rank == 0:
        assert home.trained() == [f"{home.order().id} a0001"]
    until(lambda: not processes_of(home.name(0)))


def test_killed_controller_takes_its_ranks_along(home: Home) -> None:
    """Protects the host from orphans that work on an order somebody else now has."""
    site = home.site()
    begun(home, site, home.order(seconds=1, gate=1))
    home.controller().kill()
    until(lambda: not home.ranks(0))
    home.open_gate()
    assert finish(site, home.order()).state == "done"
    assert home.trained() == [f"{home.order().id} a0001"]


def test_limit_and_reason(home: Home) -> None:
    """Protects the user: a worker that cannot start fails with its own words, once."""
    home.spec = {"fail": "no data in /nowhere", "fatal": True}
    site = home.site()
    site.submit(home.order(), None)
    status = finish(site, home.order())
    assert (status.state, status.fatal, status.error) == ("failed", True, "no data in /nowhere")
    assert not (home.root / "allocations" / "a0001").exists()
    until(lambda: not processes_of(home.name()))


def test_cancel_all_from_another_process(home: Home) -> None:
    """Protects Ctrl-C of the driver, which submitted nothing itself."""
    begun(home, home.site(), home.order(seconds=60))
    other = home.site()
    assert len(other.live_jobs()) == 1
    other.cancel_all()
    assert processes_of(home.name()) == []
    assert other.live_jobs() == []


def test_stubborn_ranks_are_killed(home: Home) -> None:
    """Protects cancel from a controller that does not answer SIGTERM."""
    site = home.site()
    acquire(site)
    home.controller().suspend()
    site.cancel_all()
    assert processes_of(home.name()) == []


def test_release_ends_an_idle_worker(home: Home) -> None:
    """Protects the facility's budget once the run is over."""
    site = home.site()
    acquire(site)
    site.release()
    until(lambda: not processes_of(home.name()))
    until(lambda: site.live_jobs() == [])  # a process on its way out is none of those before


def test_walltime_ends_the_job(home: Home) -> None:
    """Protects the walltime, which no scheduler enforces here."""
    site = home.site(walltime="00:15", renew_ahead="off")
    site.acquire()
    for rank in home.both_ranks():
        rank.suspend()  # it would leave by itself
    until(lambda: not processes_of(home.name()))
    until(lambda: site.status().state == "idle")
    log = home.root / "allocations" / "a0000" / "job" / "controller.err"
    assert "walltime exceeded" in log.read_text()


def test_a_successor_takes_over(home: Home) -> None:
    """Protects a run that is longer than its jobs: no gap, no order lost, none trained twice."""
    site, used, seq = home.site(walltime="00:40", renew_ahead="00:00:30"), [""], -1
    while used[-1] != "a0001":  # which is due with 30 s of the first one left: time to start
        seq += 1
        site.submit(home.order(seq, seconds=1), None)
        assert finish(site, home.order(seq)).state == "done"
        used = [line.split()[1] for line in home.trained()]
    trained = [line.split()[0] for line in home.trained()]
    assert trained == [home.order(number).id for number in range(seq + 1)]
    assert used[0] == "a0000"
    until(lambda: site.costs().jobs["a0000"].get("ended_s"))  # it may be on its way out still
    jobs = site.costs().jobs
    assert jobs["a0001"]["started_s"] < jobs["a0000"]["ended_s"]
    site.release()
    until(lambda: site.live_jobs() == [])


def test_a_job_for_each_order(home: Home) -> None:
    """Protects the per-round policy: each job ends with its order, by itself."""
    for seq in range(2):
        site = home.site(policy="per_round")
        assert acquire(site).allocation == f"a{seq:04d}"
        site.submit(home.order(seq), None)
        assert finish(site, home.order(seq)).state == "done"
    until(lambda: site.live_jobs() == [])
    assert home.trained() == [f"{home.order(seq).id} a{seq:04d}" for seq in range(2)]


def test_the_warning_cuts_an_order(home: Home) -> None:
    """Protects what was trained from the walltime: a partial result with the true steps."""
    site = home.site()
    begun(home, site, home.order(seconds=60))
    send(signal.SIGUSR2, home.ranks())
    result = finish(site, home.order()).result
    assert result is not None
    assert 0 < result.steps < 60 / fake_worker.BEAT_S
    until(lambda: not processes_of(home.name()))
    assert acquire(site).allocation == "a0001"


def test_a_terminated_order_goes_on_in_the_next_job(home: Home) -> None:
    """Protects an order from preemption: no result, a checkpoint, and then the rest of it."""
    site = home.site()
    begun(home, site, home.order(seconds=2, gate=1))
    send(signal.SIGTERM, home.ranks())
    home.open_gate()
    assert finish(site, home.order()).state == "done"
    assert home.trained() == [f"{home.order().id} a0001"]
    assert len(list(Spool(home.root).checkpoints.iterdir())) == 1
