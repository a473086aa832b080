"""A site's allocations and orders, on a scheduler and a clock made for the test."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds.site.world import World, order

from flwr_hpc.errors import UserError
from flwr_hpc.site.manager import AllocationManager


def test_acquire_goes_from_queued_to_ready(world: World) -> None:
    """Protects late binding: one job, followed until the model is loaded."""
    assert world.site.acquire().state == "queued"
    world.job(0, "running")
    assert world.site.acquire().state == "starting"
    world.worker(0, "loading")
    assert world.site.acquire().state == "starting"
    world.up(0)
    status = world.site.acquire()
    assert (status.state, status.allocation, status.walltime_left_s) == ("ready", "a0000", 3000.0)
    assert status.ledger == {"a0000": {"queue": 7.0, "load": 2.0, "idle": 1.0}}
    assert len(world.scheduler.jobs) == 1
    assert world.alloc(0).settings() == {"model": "tiny"}


def test_scheduler_is_asked_rarely(world: World) -> None:
    """Protects the facility's scheduler from our long polls."""
    for _ in range(20):
        world.site.acquire()
        world.clock.sleep(1.0)
    assert world.scheduler.asked == 1


def test_a_worker_that_beats_overrides_a_pending_job(world: World) -> None:
    """Protects against waiting for a scheduler whose answer is out of date."""
    world.site.acquire()
    world.worker(0, "ready")
    assert world.site.acquire().state == "ready"


def test_a_requeued_job_is_queued(world: World) -> None:
    """Protects against trusting the state file of a job's former start."""
    world.site.acquire()
    world.up(0)
    assert world.site.acquire().state == "ready"
    world.job(0, "pending")
    assert world.restart().acquire().state == "queued"


@pytest.mark.parametrize("wait", [0, 5])
def test_new_process_finds_the_live_allocation(world: World, wait: int) -> None:
    """Protects the job of a launcher that was killed."""
    world.site.acquire()
    world.up(0)
    world.clock.time += wait
    assert world.restart().acquire().state == "ready"
    assert len(world.scheduler.jobs) == 1


def test_refused_job_is_fatal(world: World) -> None:
    """Protects the user's time: trying again does not fix a wrong account."""
    world.scheduler.refusal = UserError("Slurm refused the job: invalid account")
    status = world.site.acquire()
    assert (status.state, status.fatal) == ("failed", True)
    assert "invalid account" in status.error
    assert world.restart().submit(order(), None).fatal


def test_allocations_that_never_get_ready_are_given_up(world: World) -> None:
    """Protects the budget: at most `retries` replacements, then the reason; then again."""
    world.restart(retries=1)
    world.site.acquire()
    world.job(0, "ended")
    assert world.site.acquire().state == "queued"
    world.job(1, "ended")
    status = world.site.acquire()
    assert (status.state, status.fatal) == ("failed", False)
    assert "NODE_FAIL" in status.error
    assert world.site.acquire().state == "queued"
    assert len(world.scheduler.jobs) == 3


def test_fatal_failure_of_the_worker(world: World) -> None:
    """Protects against replacing jobs that all fail for the same reason."""
    world.site.submit(order(), None)
    world.job(0, "running")
    world.worker(0, "failed", error="data: no such file", fatal=True)
    status = world.site.collect(order().id)
    assert (status.state, status.fatal, status.error) == ("failed", True, "data: no such file")
    assert world.scheduler.cancelled == ["run-fac-a0000"]  # other ranks may hang
    assert len(world.scheduler.jobs) == 1
    assert world.restart().collect(order().id).fatal


def test_submit_is_idempotent(world: World) -> None:
    """Protects against training an order twice."""
    world.site.submit(order(), Path("/w/1"))
    world.up(0)
    assert world.site.submit(order(), Path("/w/2")).state == "running"
    assert world.restart().submit(order(), None).state == "running"
    assert world.spool.order(order().id).order()[1] == Path("/w/1")
    assert world.alloc(0).inbox() == [order().id]
    world.done(order(), steps=10)
    status = world.restart().submit(order(), None)
    assert status.state == "done"
    assert status.result is not None
    assert status.result.steps == 10
    assert status.walltime_left_s == 3000.0
    assert len(world.scheduler.jobs) == 1


def test_progress_of_a_running_order(world: World) -> None:
    """Protects what the live view shows."""
    world.site.submit(order(), None)
    world.up(0)
    world.spool.order(order().id).write_progress({"step": 3, "steps": 10, "loss": 2.5, "x": 1})
    status = world.site.collect(order().id)
    assert (status.state, status.step, status.steps, status.loss) == ("running", 3, 10, 2.5)


def test_collect_of_an_order_nobody_submitted(world: World) -> None:
    """Protects against waiting for ever for an order that is not there."""
    status = world.site.collect("run-fac-000009")
    assert status.state == "failed"
    assert "submit it" in status.error


def test_dead_allocation_is_replaced_at_most_so_often(world: World) -> None:
    """Protects an order from its allocation's death, and the budget from an order."""
    world.restart(retries=1)
    world.site.submit(order(), None)
    log = world.alloc(0).job_folder / "1_0_log.err"
    log.parent.mkdir()
    log.write_text("CUDA Error: out of memory")
    world.job(0, "ended")
    assert world.site.collect(order().id).state == "queued"
    assert world.alloc(1).inbox() == [order().id]
    world.up(1)
    assert world.restart(retries=1).collect(order().id).state == "running"
    world.job(1, "ended")
    status = world.site.collect(order().id)
    assert (status.state, status.fatal) == ("failed", False)
    assert "gave up after 2" in status.error
    assert len(world.scheduler.jobs) == 2
    assert world.restart().collect(order().id).state == "failed"


def test_reason_holds_the_jobs_last_words(world: World) -> None:
    """Protects the user from a bare 'job failed'."""
    world.restart(retries=0)
    world.site.submit(order(), None)
    log = world.alloc(0).job_folder / "1_0_log.err"
    log.parent.mkdir()
    log.write_text("first\nCUDA Error: out of memory\n")
    world.job(0, "ended")
    error = world.site.collect(order().id).error
    assert "NODE_FAIL" in error
    assert "out of memory" in error


def test_failed_order_is_tried_again_when_submitted_again(world: World) -> None:
    """Protects the strategy's retries: a failure is not remembered for ever."""
    world.restart(retries=0)
    world.site.submit(order(), None)
    world.job(0, "ended")
    assert world.site.collect(order().id).state == "failed"
    assert world.restart().submit(order(), None).state == "queued"
    assert world.alloc(1).inbox() == [order().id]


def test_order_that_failed_in_a_living_allocation_gets_another(world: World) -> None:
    """Protects a second try from a worker that takes no order twice."""
    world.site.submit(order(), None)
    world.up(0)
    world.done(order(), "failed", error="bad data", fatal=True)
    assert world.site.collect(order().id).fatal
    status = world.restart().submit(order(), None)
    assert (status.state, status.allocation) == ("queued", "a0001")
    assert world.alloc(0).released
    assert world.alloc(0).inbox() == []


def test_allocation_that_closed_as_the_order_came(world: World) -> None:
    """Protects the race of an idle time-out: it counts for nothing."""
    world.restart(retries=0)
    world.site.acquire()
    world.up(0)
    world.site.submit(order(), None)
    world.worker(0, "closed", seconds={"idle": 600.0})
    assert world.site.collect(order().id).state == "queued"
    assert world.alloc(1).inbox() == [order().id]


def test_result_written_just_before_the_end_counts(world: World) -> None:
    """Protects finished work of a job that died after it."""
    world.site.submit(order(), None)
    world.done(order())
    world.job(0, "ended")
    assert world.site.collect(order().id).state == "done"
    assert len(world.scheduler.jobs) == 1


def test_unknown_is_not_ended(world: World) -> None:
    """Protects a healthy job from a scheduler that is down."""
    world.site.submit(order(), None)
    world.job(0, "unknown")
    assert world.site.collect(order().id).state == "queued"
    assert world.restart().collect(order().id).state == "queued"
    world.worker(0, "ready")
    assert world.site.collect(order().id).state == "running"
    world.clock.time += 1000
    world.worker(0, "ready")
    assert world.site.collect(order().id).state == "running"
    assert len(world.scheduler.jobs) == 1


def test_worker_that_stopped_beating_is_replaced(world: World) -> None:
    """Protects against a job that runs and does nothing; polls of one process."""
    world.site.submit(order(), None)
    world.up(0)
    for _ in range(119):
        assert world.site.collect(order().id).state == "running"
        world.clock.time += 1
    world.clock.time += 5
    assert world.site.collect(order().id).state == "queued"
    assert world.scheduler.cancelled == ["run-fac-a0000"]


def test_suspended_job_is_no_hang(world: World) -> None:
    """Protects a job that the scheduler has suspended: its worker cannot beat."""
    world.site.submit(order(), None)
    world.up(0)
    assert world.site.collect(order().id).state == "running"
    world.scheduler.words["run-fac-a0000"] = {"suspended": True}
    world.clock.time += 50
    for _ in range(300):
        world.clock.time += 1
        assert world.site.collect(order().id).state == "running"
    assert world.scheduler.cancelled == []


def test_hang_is_noticed_across_short_lived_processes(world: World) -> None:
    """Protects the same when every process polls for less than the limit."""
    world.site.submit(order(), None)
    world.up(0)
    for _ in range(3):
        world.restart()
        for _ in range(4):
            assert world.site.collect(order().id).state == "running"
            world.clock.time += 10
    assert world.restart().collect(order().id).state == "running"
    world.clock.time += 11
    assert world.site.collect(order().id).state == "queued"
    assert world.scheduler.cancelled == ["run-fac-a0000"]


def test_two_launchers_at_once_submit_one_job(world: World) -> None:
    """Protects the lock on the site's folder."""
    sites = [world.restart() for _ in range(4)]
    gate = threading.Barrier(len(sites))

    def act(site: AllocationManager) -> None:
        gate.wait()
        site.acquire()

    threads = [threading.Thread(target=act, args=(site,)) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(world.scheduler.jobs) == 1


def test_killed_between_a_job_s_end_and_the_verdict(world: World) -> None:
    """Protects a resumed run from waiting for a job that was known to have ended."""
    world.site.acquire()
    world.job(0, "running")
    assert world.site.acquire().state == "starting"
    world.job(0, "ended", outcome="cancelled")
    assert world.restart().live_jobs() == []
    assert world.restart().acquire().allocation == "a0001"


def test_a_refused_job_is_not_looked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the last word of a run without sbatch from a job that cannot be there."""
    world.scheduler.refusal = UserError("sbatch was not found on this host")
    world.site.acquire()
    monkeypatch.setattr(world.scheduler, "find", None)
    world.restart().cancel_all()
    assert world.site.live_jobs() == []


def _until(world: World, states: list[str]) -> Callable[[], Any]:
    answers = iter(states)
    base = world.site.status()
    return lambda: type(base)(next(answers))


def test_wait_ends_with_the_state_or_the_time(world: World) -> None:
    """Protects long polls: answered at once when done, and at `wait_s` at the latest."""
    began = world.clock.now()
    status = world.site.wait(_until(world, ["running"] * 3 + ["done"]), None, {"done"})
    assert status.state == "done"
    assert world.clock.now() - began == pytest.approx(0.05 + 0.065 + 0.0845)
    began = world.clock.now()
    assert world.site.wait(_until(world, ["queued"] * 50), 10.0, {"done"}).state == "queued"
    assert world.clock.now() - began == pytest.approx(10.0)
    assert world.site.wait(_until(world, ["queued"]), 0.0, {"done"}).state == "queued"


@pytest.mark.parametrize(("poll_s", "longest"), [(30.0, 5.0), (2.0, 2.0), (0.5, 0.5)])
def test_a_queued_job_is_looked_at_seldom(world: World, poll_s: float, longest: float) -> None:
    """Protects the login node while jobs wait for hours; a local job has no queue."""
    world.scheduler.poll_s = poll_s
    pauses: list[float] = []
    states = iter([*["queued"] * 20, *["running"] * 5, "done"])
    base = world.site.status()

    def poll() -> Any:
        pauses.append(world.clock.now())
        return type(base)(next(states))

    world.site.wait(poll, None, {"done"})
    gaps = [b - a for a, b in itertools.pairwise(pauses)]
    assert max(gaps) == pytest.approx(longest)
    assert max(gaps[20:]) == pytest.approx(0.5)


def test_files_are_json(world: World) -> None:
    """Protects other readers of the spool: what the launcher writes is JSON."""
    world.site.submit(order(), None)
    world.up(0)
    world.site.collect(order().id)
    world.job(0, "ended")
    world.site.collect(order().id)
    for path in world.spool.root.rglob("*.json"):
        json.loads(path.read_text())
