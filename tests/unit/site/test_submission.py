"""How a job is submitted once, whoever is killed and whatever the scheduler leaves unanswered."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from worlds.site.world import Killed, World, order

from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import NotYetError, SchedulerUnavailableError
from flwr_hpc.spool import SubmissionMark


@pytest.mark.parametrize("trouble", [Killed(), SchedulerUnavailableError("timed out")])
def test_job_submitted_but_not_written_down_is_adopted(
    world: World, trouble: BaseException
) -> None:
    """Protects against a second job, and a lost one, after a crash in the middle of submit."""
    world.scheduler.trouble = trouble
    if isinstance(trouble, Killed):
        with pytest.raises(Killed):
            world.site.acquire()
    else:
        assert world.site.acquire().state == "queued"
    world.scheduler.trouble = None
    assert world.restart().acquire().state == "queued"
    assert len(world.scheduler.jobs) == 1
    assert world.alloc(0).job() is not None


def test_killed_before_the_submit(world: World) -> None:
    """Protects an allocation that was declared and never submitted."""
    world.scheduler.refusal = Killed()
    with pytest.raises(Killed):
        world.site.acquire()
    world.scheduler.refusal = None
    world.restart().acquire()
    assert list(world.scheduler.jobs) == ["run-fac-a0000"]


def test_killed_in_the_middle_of_the_submit(world: World) -> None:
    """Protects against a second job: sbatch outlives its launcher, and may not be through yet."""
    world.scheduler.refusal = Killed()
    with pytest.raises(Killed):
        world.site.acquire()
    mark = world.alloc(0).submission
    before = mark.read()
    assert before is not None
    mark.write(replace(before, until_s=world.clock.wall() + 60.0))
    world.scheduler.refusal = None
    assert "killed" in world.restart().acquire().reason
    assert not world.scheduler.jobs
    world.clock.sleep(61.0)
    assert world.restart().acquire().state == "queued"
    assert list(world.scheduler.jobs) == ["run-fac-a0000"]


def test_submission_is_not_hammered(world: World) -> None:
    """Protects a scheduler that does not answer from a submission per poll."""
    world.scheduler.refusal = SchedulerUnavailableError("no answer")
    assert world.site.acquire().state == "queued"
    world.scheduler.refusal = AssertionError("asked too soon")
    world.clock.sleep(1.0)
    assert world.site.acquire().state == "queued"
    world.scheduler.refusal = None
    world.clock.sleep(60.0)
    world.site.acquire()
    assert len(world.scheduler.jobs) == 1


def mark(world: World, number: int) -> SubmissionMark:
    """Return what is written down of the tries to submit a job."""
    found = world.alloc(number).submission.read()
    assert found is not None
    return found


def test_unanswered_submission_is_looked_for_before_it_is_repeated(world: World) -> None:
    """Protects against a second job: a busy controller may take a request long after."""
    lost = SchedulerUnavailableError("sbatch: Connection reset by peer")
    world.scheduler.refusal = lost
    assert "Connection reset" in world.site.acquire().reason
    world.scheduler.away = lost  # and for a long time it does not say anything at all
    world.clock.sleep(600.0)
    assert world.site.acquire().state == "queued"
    world.scheduler.away = None
    world.scheduler.refusal = AssertionError("submitted again too soon")
    world.clock.sleep(31.0)
    assert "on its way" in world.site.acquire().reason
    world.scheduler.refusal = None
    world.scheduler.accept(world.name(0))  # the request of then arrives now
    world.clock.sleep(31.0)
    assert world.site.acquire().state == "queued"
    assert world.alloc(0).job() is not None
    assert len(world.scheduler.jobs) == 1


def lose_request(world: World) -> None:
    """Have a request go unanswered, until it is given up."""
    world.scheduler.refusal = SchedulerUnavailableError("sbatch: no answer in 120 s")
    world.site.acquire()
    world.scheduler.refusal = None
    world.clock.sleep(61.0)


@pytest.mark.parametrize("end", [False, True])
def test_job_of_a_request_that_was_given_up_is_cancelled(world: World, end: bool) -> None:
    """Protects queue and budget: a request may be taken after another job is there; ours stays."""
    lose_request(world)
    world.site.submit(order(), None)
    name = world.name(0)
    world.scheduler.late[name] = ["late"]
    world.clock.sleep(31.0)
    if end:
        world.restart().cancel_all()
        assert world.scheduler.cancelled == [f"{name}/late", name]
    else:
        assert world.restart().collect(order().id).state == "queued"
        assert world.scheduler.cancelled == [f"{name}/late"]
        world.scheduler.late[name] = ["later"]
        world.clock.sleep(31.0)
        world.site.collect(order().id)
        assert world.scheduler.cancelled == [f"{name}/late", f"{name}/later"]


def test_job_that_comes_after_its_allocation_was_given_up_is_cancelled(world: World) -> None:
    """Protects the queue from a job that nothing waits for, before the run's end."""
    world.restart(queue_deadline_s=50.0)
    lose_request(world)
    world.scheduler.refusal = SchedulerUnavailableError("sbatch: no answer in 120 s")
    assert "could not be submitted" in world.site.acquire().error
    world.scheduler.late[world.name(0)] = ["late"]
    world.clock.sleep(31.0)
    world.site.status()
    assert world.scheduler.cancelled == [f"{world.name(0)}/late"]


@pytest.mark.parametrize("trouble", [None, NotYetError("the queue is full"), Killed()])
def test_late_jobs_are_not_looked_for_where_there_can_be_none(
    world: World, trouble: BaseException | None
) -> None:
    """Protects the scheduler from a request more at every poll, and its jobs from a mistake."""
    world.scheduler.refusal = None if isinstance(trouble, Killed) else trouble
    world.scheduler.trouble = trouble if isinstance(trouble, Killed) else None
    with suppress(Killed):
        world.site.acquire()
    world.scheduler.refusal = world.scheduler.trouble = None
    for _ in range(3):
        world.clock.sleep(31.0)
        world.restart().acquire()
    world.site.cancel_all()
    assert world.scheduler.looked == []


def test_refusal_after_a_request_that_was_lost_forgets_it_not(world: World) -> None:
    """Protects the queue: sbatch's second word is of the second request alone."""
    lose_request(world)
    world.scheduler.refusal = UserError("invalid partition")
    assert world.site.acquire().fatal
    world.scheduler.late[world.name(0)] = ["late"]
    world.site.cancel_all()
    assert world.scheduler.cancelled == [f"{world.name(0)}/late"]


def test_job_that_is_not_taken_yet_is_asked_for_again(world: World) -> None:
    """Protects the run from a limit that passes: it waits, says why, and does not hammer."""
    world.scheduler.refusal = NotYetError("PBS does not take the job now: Queue is not enabled")
    status = world.site.acquire()
    assert (status.state, status.fatal) == ("queued", False)
    assert "Queue is not enabled" in status.reason
    assert mark(world, 0).until_s == 0.0  # certainly there is none to wait for
    world.scheduler.refusal = None
    world.clock.sleep(31.0)
    assert world.site.acquire().state == "queued"
    assert len(world.scheduler.jobs) == 1


def test_job_that_is_never_taken_is_given_up_at_the_deadline(world: World) -> None:
    """Protects the user from waiting for ever; what passes with time is not fatal."""
    world.restart(queue_deadline_s=100.0)
    world.scheduler.refusal = NotYetError("Maximum number of jobs already in queue")
    for _ in range(4):
        assert world.site.acquire().state == "queued"
        world.clock.sleep(31.0)
    status = world.site.acquire()
    assert (status.state, status.fatal) == ("failed", False)
    assert "Maximum number of jobs" in status.error


def test_successor_that_is_not_possible_yet_ends_nothing(world: World) -> None:
    """Protects the run in a queue of one job per user: the slot is free once the first ends."""
    world.restart(renew_ahead="00:50:00", queue_deadline_s=100.0, retries=0)
    world.site.submit(order(), None)
    world.up(0)
    world.scheduler.refusal = NotYetError("would exceed queue workq's per-user limit")
    for _ in range(20):
        world.clock.sleep(31.0)
        world.worker(0, "running", walltime_left_s=2000.0)
        assert world.site.collect(order().id).state == "running"
    assert [a.name for a in world.spool.allocations()] == ["a0000", "a0001"]
    assert world.alloc(1).verdict.read() is None
    world.done(order())
    world.worker(0, "closed")
    world.scheduler.refusal = None
    world.clock.sleep(31.0)
    assert world.site.submit(order(1), None).state == "queued"
    assert world.alloc(1).inbox() == [order(1).id]
    assert list(world.scheduler.jobs) == [world.name(0), world.name(1)]
