"""`Status.queued_s`: the time in the queue that kept the site from working."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worlds.site.world import World, order

from flwr_hpc.site.monitoring.job_times import waiting_s, waits_and_runs
from flwr_hpc.spool import QueueCycle


def cycle(submitted: float | None, started: float | None, ended: float | None) -> QueueCycle:
    return QueueCycle(submitted, submitted, started, ended)


@pytest.mark.parametrize(
    ("waits", "runs", "seconds"),
    [
        ([], [], 0.0),
        ([(0, 100)], [(100, 500)], 100.0),
        ([(0, 100), (400, 450)], [(100, 500), (450, 900)], 100.0),  # a successor, in time
        ([(0, 100), (400, 700)], [(100, 500), (700, 900)], 300.0),  # 200 s of it came too late
        ([(0, 100), (50, 200)], [], 200.0),  # two that queue at once: each moment counts once
        ([(100, 300)], [(0, 150), (140, 200)], 100.0),  # two that run at once
    ],
)
def test_only_time_without_a_running_job_is_waiting(waits: Any, runs: Any, seconds: float) -> None:
    """Protects FedQueue's forecast from a successor that queues while its predecessor works."""
    assert waiting_s(waits, runs) == seconds


def test_cycles_of_a_requeued_job() -> None:
    """Protects the second wait of a preempted job: nothing ran then."""
    cycles = [cycle(100, 160, 500), cycle(500, 530, None)]
    waits, runs = waits_and_runs(cycles, until=600.0)
    assert (waits, runs) == ([(100, 160), (500, 530)], [(160, 500), (530, 600)])
    assert waiting_s(waits, runs) == 90.0
    assert waits_and_runs([cycle(100, None, 175)], until=600.0) == ([(100, 175)], [])
    assert waits_and_runs([cycle(None, 160, 170)], until=600.0) == ([], [(160, 170)])


def test_a_site_counts_what_its_jobs_waited_with_none_running(tmp_path: Path) -> None:
    """Protects the site's own number: it grows in the queue, and stands still while a job runs."""
    world = World(tmp_path / "site")
    submitted = world.clock.wall()
    world.site.submit(order(), None)
    world.clock.time += 100.0
    assert world.site.acquire().queued_s == 100.0  # still in the queue
    start = submitted + 120.0
    world.job(0, "running", started_s=start)
    world.worker(0, "running", order_id=order().id, walltime_left_s=50.0)
    world.clock.time = start - 1e9 + 200.0
    assert world.site.collect(order().id).queued_s == 120.0  # its successor is submitted
    assert len(world.scheduler.jobs) == 2
    world.clock.time += 40.0
    status = world.site.collect(order().id)
    assert status.ledger["a0001"]["queue"] == 40.0
    assert status.queued_s == 120.0
    world.worker(0, "closed", seconds={"train": 300.0})
    world.job(0, "ended", started_s=start, ended_s=start + 260.0)  # 60 s after the submission
    world.clock.time = start - 1e9 + 300.0
    assert world.site.acquire().queued_s == 160.0


def test_a_job_whose_end_nobody_tells_ran_as_long_as_its_worker(tmp_path: Path) -> None:
    """Protects from a wait that appears, or vanishes, once a batch system has forgotten a job."""
    world = World(tmp_path / "site")
    world.site.submit(order(), None)
    world.job(0, "running")  # started 7 s after its submission
    world.worker(0, "running", order_id=order().id, walltime_left_s=3000.0)
    world.site.collect(order().id)
    world.worker(0, "closed", seconds={"load": 20.0, "train": 80.0})
    started = world.scheduler.jobs[world.name(0)]["submitted_s"] + 7.0
    world.job(0, "ended", started_s=started, outcome="lost")
    world.site.acquire()  # submits another one
    world.job(1, "pending")
    world.clock.time += 500.0
    assert world.site.acquire().queued_s == 7.0 + 31.0 + 500.0
    world.job(1, "running", started_s=world.clock.wall())
    assert world.site.acquire().queued_s == 7.0 + 31.0 + 500.0
