"""One allocation on a real cluster, from the first message to the release."""

from __future__ import annotations

import uuid
from pathlib import Path

import fake_worker
import pytest
from job_tools import facility, until

from flwr_hpc.config import AllocationConfig
from flwr_hpc.errors import UserError
from flwr_hpc.jobs.allocation import Site
from flwr_hpc.jobs.slurm import SlurmScheduler
from flwr_hpc.jobs.waiting import SystemClock
from flwr_hpc.protocol import Order
from flwr_hpc.spool import Spool

pytestmark = pytest.mark.slurm


def test_an_allocation_on_a_real_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Protects the whole path: sbatch, two ranks by srun, an order, the accounting, release."""
    where = facility("slurm", tmp_path, monkeypatch)
    scheduler = SlurmScheduler(where)
    scheduler.poll_s = 1.0
    key = uuid.uuid4().hex[:8]

    @request.addfinalizer
    def _() -> None:
        site().cancel_all()

    def site() -> Site:
        limits, clock = AllocationConfig(), SystemClock()
        spool = Spool(tmp_path / "site")
        return Site(spool, key, "real", where, limits, scheduler, {}, clock, entry=fake_worker.run)

    order = Order(key, "real", 0, "train", steps=5, options={"seconds": 1})
    first = site()
    first.hand_in(order, None)
    (job,) = first.live_jobs()
    again = site()
    status = again.wait(lambda: again.collect(order.id), 60, {"done", "failed"})
    assert status.state == "done", status.error
    assert status.allocation == "a0000"
    again.release()
    until(lambda: again.live_jobs() == [], 60)
    info = scheduler.info(job)
    assert (info.state, info.reason) == ("ended", "COMPLETED")
    assert info.queue_s is not None
    assert (tmp_path / "site" / "trained.log").read_text() == f"{order.id} a0000\n"
    assert len(list(Path(job["folder"]).glob("*_log.out"))) == 2


def test_a_refused_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the reading of sbatch's own words."""
    where = facility("slurm", tmp_path, monkeypatch)
    where.partition = "nowhere"
    site = Site(
        Spool(tmp_path),
        "k",
        "real",
        where,
        AllocationConfig(),
        SlurmScheduler(where),
        {},
        SystemClock(),
    )
    status = site.acquire()
    assert status.fatal
    assert "partition" in status.error
    assert UserError.__name__ not in status.error
