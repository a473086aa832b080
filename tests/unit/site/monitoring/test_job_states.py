"""One watcher per facility, and the times it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds.clock import FakeClock

from flwr_hpc.schedulers.base import JobInfo, JobSpec, JobState
from flwr_hpc.site.monitoring.job_states import JobStates
from flwr_hpc.site.monitoring.job_times import record_times, total_s, waits_and_runs
from flwr_hpc.spool import AllocationDir, JobTimes, Spool

JOBS: list[dict[str, Any]] = [{"id": "1", "name": "a"}, {"id": "2", "name": "b"}]


class Scheduler:
    """Counts requests, and says what the test wants."""

    poll_s = 30.0

    def __init__(self) -> None:
        self.state: JobState = "pending"
        self.requests: list[list[str]] = []

    def infos(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobInfo]:
        self.requests.append([job["name"] for job in jobs])
        return {job["name"]: JobInfo(job["id"], job["name"], self.state) for job in jobs}

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        raise NotImplementedError

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        raise NotImplementedError

    def cancel(self, job: dict[str, Any]) -> None:
        raise NotImplementedError

    def estimate(self, spec: JobSpec) -> float | None:
        raise NotImplementedError

    def script(self, spec: JobSpec) -> str:
        raise NotImplementedError


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1000.0, epoch=1e9)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def queues(tmp_path: Path, scheduler: Scheduler, clock: FakeClock) -> list[JobStates]:
    """Three processes of one site."""
    return [JobStates(Spool(tmp_path), scheduler, clock, lambda: JOBS) for _ in range(3)]


def test_all_processes_of_a_site_ask_twice_a_minute(
    queues: list[JobStates], scheduler: Scheduler, clock: FakeClock
) -> None:
    """Protects the batch system: centres ban users who ask too often, whatever waits."""
    for _ in range(600):  # ten minutes
        for queue in queues:
            for job in JOBS:
                assert queue.get(job).state == "pending"
        clock.sleep(1.0)
    assert len(scheduler.requests) == 20
    assert set(map(tuple, scheduler.requests)) == {("a", "b")}


def test_no_news_keeps_the_old(
    queues: list[JobStates], scheduler: Scheduler, clock: FakeClock
) -> None:
    """Protects a running job while the scheduler does not answer."""
    scheduler.state = "running"
    queues[0].get(JOBS[0])
    scheduler.state = "unknown"
    clock.sleep(60.0)
    assert queues[1].get(JOBS[0]).state == "running"
    assert len(scheduler.requests) == 2
    scheduler.state = "ended"
    assert queues[2].get(JOBS[0]).state == "running"  # it was just asked
    clock.sleep(30.0)
    assert queues[2].get(JOBS[0]).state == "ended"


def test_a_clock_set_back(queues: list[JobStates], scheduler: Scheduler, clock: FakeClock) -> None:
    """Protects against silence until the clock has caught up."""
    queues[0].get(JOBS[0])
    clock.time -= 86400.0
    scheduler.state = "running"
    assert queues[1].get(JOBS[0]).state == "running"
    assert queues[0].get(JOBS[1]).state == "running"
    assert len(scheduler.requests) == 2


def test_what_nobody_asks_for_is_forgotten(
    tmp_path: Path, scheduler: Scheduler, clock: FakeClock
) -> None:
    """Protects a run of a job per round from a file that grows with every round."""
    wanted = list(JOBS)
    queue = JobStates(Spool(tmp_path), scheduler, clock, lambda: wanted)
    queue.get(JOBS[0])
    del wanted[0]
    clock.sleep(60.0)
    queue.get(JOBS[1])
    answer = Spool(tmp_path).job_states.read()
    assert answer is not None
    assert list(answer.jobs) == ["b"]


def test_another_job_of_that_name_is_not_known(queues: list[JobStates], clock: FakeClock) -> None:
    """Protects a job submitted anew from its predecessor's end."""
    queues[0].get(JOBS[0])
    assert queues[0].get({"id": "7", "name": "a"}).state == "unknown"
    assert queues[0].get({"id": "1", "name": "new"}).state == "unknown"


def times(alloc: AllocationDir) -> JobTimes:
    times = alloc.times.read()
    assert times is not None
    return times


def queue_s(times: JobTimes) -> float:
    return total_s(waits_and_runs(times.cycles, 0.0)[0])


def said(state: JobState, submitted: float, started: float | None, **fields: Any) -> JobInfo:
    return JobInfo("1", "a", state, submitted, submitted + 1, started, nodes=2, **fields)


def test_times_of_a_job_that_was_requeued(tmp_path: Path) -> None:
    """Protects the queue's seconds and the node-hours of a job that started twice."""
    alloc = AllocationDir(tmp_path)
    record_times(alloc, said("pending", 100.0, None))
    assert alloc.times.read() is None
    record_times(alloc, said("running", 100.0, 160.0))
    record_times(alloc, said("running", 100.0, 160.0))
    assert queue_s(times(alloc)) == 60.0
    record_times(alloc, said("running", 100.0, None, restarts=1))  # on its way back to the queue
    assert [c.ended_s for c in times(alloc).cycles] == [None]
    record_times(alloc, said("pending", 500.0, None, restarts=1))  # preempted at 500
    kept = times(alloc)
    assert (kept.restarts, [c.ended_s for c in kept.cycles]) == (1, [500.0])
    record_times(alloc, said("running", 500.0, 530.0, restarts=1))
    end = said("ended", 500.0, 530.0, restarts=1, ended_s=900.0, outcome="completed")
    record_times(alloc, end)
    kept = times(alloc)
    assert [(c.started_s, c.ended_s) for c in kept.cycles] == [(160, 500), (530, 900)]
    assert (kept.id, kept.nodes, kept.outcome) == ("1", 2, "completed")
    assert queue_s(kept) == 90.0
    record_times(alloc, JobInfo("1", "a", "ended", outcome="lost"))
    assert times(alloc).restarts == 1


def test_times_of_a_requeue_that_nobody_saw(tmp_path: Path) -> None:
    """Protects the first cycle's end when the launcher was away during the second wait."""
    alloc = AllocationDir(tmp_path)
    record_times(alloc, said("running", 100.0, 160.0))
    record_times(alloc, said("running", 500.0, 530.0, restarts=1))
    assert [c.ended_s for c in times(alloc).cycles] == [500.0, None]


def test_times_of_a_rerun_without_a_time_of_its_requeue(tmp_path: Path) -> None:
    """Protects the hours of a first run whose end nobody tells: not beyond the second's start."""
    alloc = AllocationDir(tmp_path)
    record_times(alloc, said("running", 100.0, 160.0))
    again = JobInfo("1", "a", "running", None, None, 530.0, nodes=2, restarts=1)
    record_times(alloc, again)
    assert [(c.started_s, c.ended_s) for c in times(alloc).cycles] == [(160, 530), (530, None)]


def test_times_of_a_job_that_never_started(tmp_path: Path) -> None:
    """Protects the report: a job that was cancelled in the queue has waited, and has ended."""
    alloc = AllocationDir(tmp_path)
    record_times(alloc, said("pending", 100.0, None))
    record_times(alloc, said("ended", 100.0, None, ended_s=175.0))
    record_times(alloc, said("ended", 100.0, None, ended_s=175.0))
    assert queue_s(times(alloc)) == 75.0
    assert [(c.started_s, c.ended_s) for c in times(alloc).cycles] == [(None, 175.0)]


def test_no_answer_leaves_the_times(tmp_path: Path) -> None:
    """Protects what was kept from an answer that says nothing."""
    alloc = AllocationDir(tmp_path)
    record_times(alloc, said("running", 100.0, 160.0))
    before = times(alloc)
    record_times(alloc, JobInfo("1", "a", "unknown"))
    assert times(alloc) == before
    record_times(alloc, JobInfo("1", "a", "ended", outcome="lost"))
    assert times(alloc) == replace(before, outcome="lost")
