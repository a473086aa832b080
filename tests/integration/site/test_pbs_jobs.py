"""Allocations on PBS: a site with a worker that needs no torch, and one whole run."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from worlds import worker as fake_worker
from worlds.hosts.stranger import open_to_others
from worlds.jobs import facility, install_fake_pbs, processes_of, until
from worlds.runs.run import SMALL, Run

from flwr_hpc.clock import SystemClock
from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.protocol import Order, Status
from flwr_hpc.schedulers.pbs.adapter import PbsScheduler
from flwr_hpc.site.manager import AllocationManager
from flwr_hpc.spool import Spool


class Centre:
    """A site at a PBS centre; every call of `site` is like a new process."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.run_key = tmp_path / "site", uuid.uuid4().hex[:8]
        self.facility = facility("fake_pbs", tmp_path, monkeypatch)
        self.server = Path(os.environ["FAKE_PBS"])

    def site(self, poll_s: float = 0.2, walltime: str = "01:00:00") -> AllocationManager:
        where = replace(self.facility, poll_s=poll_s, walltime=walltime)
        return AllocationManager(
            Spool(self.root),
            self.run_key,
            "here",
            where,
            AllocationConfig(renew_ahead="off"),
            PbsScheduler(where),
            {},
            SystemClock(),
            entry=fake_worker.run,
        )

    def order(self, seconds: float) -> Order:
        return Order(self.run_key, "here", 0, "train", steps=100, options={"seconds": seconds})

    def jobs(self) -> list[dict[str, object]]:
        return [json.loads(p.read_text()) for p in sorted(self.server.glob("*.json"))]


@pytest.fixture
def centre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Centre]:
    centre = Centre(tmp_path, monkeypatch)
    yield centre
    centre.site().cancel_all()
    names = [f"{centre.run_key}-here-a{number:04d}" for number in range(3)]
    until(lambda: not [p for name in names for p in processes_of(name)])
    until(lambda: all(job["state"] == "F" for job in centre.jobs()))


def finish(site: AllocationManager, order: Order) -> Status:
    final = {"done", "failed"}

    def look() -> Status | None:
        status = site.wait(lambda: site.collect(order.id), 5.0, final)
        return status if status.state in final else None

    status = until(look, site.spool.root)
    assert status is not None
    return status


def test_order_goes_on_in_a_job_that_was_put_back(centre: Centre) -> None:
    """Protects an order from preemption: the same job, from where it was."""
    site, order = centre.site(), centre.order(seconds=3)
    site.submit(order, None)
    until(lambda: site.collect(order.id).step > 5)
    (centre.server / "1.do").write_text("rerun")
    until(lambda: centre.jobs()[0]["runs"] == 2)
    status = finish(centre.site(), order)
    assert (status.state, status.steps) == ("done", 100)
    (job,) = centre.jobs()
    assert job["runs"] == 2


def test_worker_keeps_its_own_clock(centre: Centre) -> None:
    """Protects the work before the walltime's end, of which PBS gives no warning."""
    site, order = centre.site(walltime="00:00:30"), centre.order(seconds=60)
    site.submit(order, None)
    status = finish(site, order)
    assert status.state == "done"
    assert 0 < status.steps < 30 / fake_worker.BEAT_S
    until(lambda: centre.jobs()[0]["state"] == "F")
    assert centre.jobs()[0]["exit"] == 0


def test_requests_to_the_server_are_few(centre: Centre) -> None:
    """Protects the centre's server: one request per poll, however often the site is asked."""
    site, order = centre.site(poll_s=3600), centre.order(seconds=2)
    site.submit(order, None)
    assert finish(site, order).state == "done"
    asked = (centre.server / "asked.log").read_text().splitlines()
    assert len(asked) == 2  # one of the launcher's, and the job's own, for its walltime


def test_whole_run_on_pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the one command at a PBS centre: two ranks train, and the job is gone after it."""
    install_fake_pbs(tmp_path / "fake", monkeypatch)
    shape = {"account": "null", "gpus_per_node": 0, "ranks_per_node": 2, "cpus_per_rank": 1}
    here = [f"facilities.pbs.{key}={value}" for key, value in {**shape, "poll_s": 1}.items()]
    model = [o for o in SMALL if o.startswith(("model.", "data.seq", "data.held"))]
    run = Run(
        tmp_path / "run",
        "+facility=pbs",
        *here,
        "data.paths.pbs=[json]",
        "train.steps=40",
        "train.warmup_steps=5",
        "rounds=1",
        settings=model,
    )
    assert run.end() == 0, run.said()
    site = run.summary()["facilities"]["pbs"]
    assert site["steps"] == 40
    assert site["held_out_loss_last"] < site["held_out_loss_first"]
    jobs = [json.loads(p.read_text()) for p in (tmp_path / "fake").glob("*.json")]
    assert [(job["state"], job["substate"]) for job in jobs] == [("F", 92)]
    assert run.left_behind() == []
    assert open_to_others(run.dir) == {}
