"""What follows from each way an allocation can end, and what is told of jobs on the way."""

from __future__ import annotations

from typing import Any

import pytest
from worlds.site.world import Killed, World, order

from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import SchedulerUnavailableError
from flwr_hpc.site.monitoring.outcomes import RULES, SCHEDULER_OUTCOMES


def closed(world: World) -> None:
    world.worker(0, "closed", seconds={"idle": 1.0})


def failed(world: World) -> None:
    world.job(0, "running")
    world.worker(0, "failed", error="the disk is full")


def disk(world: World) -> None:
    world.job(0, "running")
    world.worker(0, "failed", error="No space left on device", disk=True)
    with pytest.raises(OSError, match="No space left"):
        world.site.collect(order().id)
    world.clock.sleep(60)


def interrupted(world: World) -> None:
    world.worker(0, "interrupted")
    world.job(0, "ended", outcome="completed", reason="")


def rejected(world: World) -> None:
    world.scheduler.refusal = UserError("Slurm refused the job: invalid account")


def held(world: World) -> None:
    world.job(0, "pending", stuck="held", reason="JobHeldAdmin")


def impossible(world: World) -> None:
    world.job(0, "pending", stuck="impossible", reason="AssocMaxNodePerJobLimit")


def overdue(world: World) -> None:
    world.restart(queue_deadline_s=20.0)
    world.job(0, "pending", reason="Priority")


CAUSES: dict[str, Any] = {
    "closed": closed,
    "failed": failed,
    "disk": disk,
    "interrupted": interrupted,
    "held": held,
    "impossible": impossible,
    "overdue": overdue,
}
WORDS = {
    "failed": "the disk is full", "held": "JobHeldAdmin", "overdue": "Priority",
    "impossible": "AssocMaxNodePerJobLimit", "rejected": "invalid account",
}  # fmt: skip


@pytest.mark.parametrize("why", [w for w in RULES if w != "cancelled"])
def test_each_row_of_the_table(world: World, why: str) -> None:
    """Protects a run from each way a job can end: what is kept, replaced and told."""
    world.restart(retries=0)
    if why == "rejected":
        rejected(world)
        world.site.submit(order(), None)
    else:
        world.site.submit(order(), None)
        outcome = next((o for o, w in SCHEDULER_OUTCOMES.items() if w == why), "failed")
        CAUSES.get(why, lambda w: w.job(0, "ended", outcome=outcome))(world)
    status = world.site.collect(order().id)
    verdict = world.alloc(0).verdict.read()
    assert verdict is not None
    assert verdict.why == why
    rule = RULES[verdict.why]
    if rule.consequence == "replace":
        assert (status.state, status.allocation) == ("queued", "a0001")
        return
    assert (status.state, status.fatal) == ("failed", rule.consequence == "fatal")
    assert rule.message in status.error
    assert WORDS.get(why, "") in status.error
    assert world.restart().collect(order().id).error == status.error
    if why in ("held", "impossible", "overdue"):
        assert world.scheduler.cancelled == ["run-fac-a0000"]
        assert world.alloc(0).released  # should it start in spite of all


@pytest.mark.parametrize("why", ["preempted", "held", "lost", "cancelled"])
def test_a_replacement_goes_on(world: World, why: str) -> None:
    """Protects a run from what is nobody's fault: another job is submitted."""
    world.site.submit(order(), None)
    if why == "held":
        held(world)
    else:
        world.job(0, "ended", outcome=why)
    status = world.site.collect(order().id)
    assert (status.state, status.allocation) == ("queued", "a0001")
    assert world.alloc(1).inbox() == [order().id]


def test_user_hold_is_told(world: World) -> None:
    """Protects from silence: a job held by hand is cancelled, and the message says so."""
    world.restart(retries=0)
    world.site.acquire()
    world.job(0, "pending", stuck="held", reason="JobHeldUser")
    status = world.site.acquire()
    assert status.state == "failed"
    assert "a person may have done that" in status.error


def test_progress_costs_no_retry(world: World) -> None:
    """Protects long orders in preemptable queues: only fruitless jobs are counted."""
    world.restart(retries=1)
    world.site.submit(order(), None)
    for number in range(5):
        world.up(number)
        world.saved(order(), 10 * number + 10)
        world.job(number, "ended", outcome="preempted")
        status = world.site.collect(order().id)
        assert (status.state, status.allocation) == ("queued", f"a{number + 1:04d}")
    world.job(5, "ended", outcome="preempted")
    assert world.site.collect(order().id).state == "queued"  # the first without progress
    world.job(6, "ended", outcome="node_fail", reason="NODE_FAIL on n3")
    status = world.site.collect(order().id)
    assert status.state == "failed"
    assert "gave up after 2 allocations" in status.error
    assert "lost a node: NODE_FAIL on n3" in status.error


def test_checkpoints_of_other_orders_are_no_progress(world: World) -> None:
    """Protects the budget from an order that never gets anywhere."""
    world.restart(retries=0)
    world.saved(order(3), 50)
    world.site.submit(order(4), None)
    world.job(0, "ended", outcome="preempted")
    assert world.site.collect(order(4).id).state == "failed"


def test_a_requeued_job_keeps_its_allocation_and_order(world: World) -> None:
    """Protects from a second job beside the one that the scheduler starts again."""
    world.site.submit(order(), None)
    world.up(0)
    assert world.site.collect(order().id).state == "running"
    world.worker(0, "interrupted")
    assert world.site.collect(order().id).state == "queued"  # until the scheduler has spoken
    world.job(0, "pending", reason="BeginTime", restarts=1)
    status = world.site.collect(order().id)
    assert (status.state, status.allocation, status.reason) == ("queued", "a0000", "BeginTime")
    assert world.restart().collect(order().id).state == "queued"
    world.job(0, "running", restarts=1)
    assert world.site.collect(order().id).state == "starting"  # its last word is an old one
    world.clock.time += 300  # slow to start: not a hang
    assert world.restart().collect(order().id).state == "starting"
    world.worker(0, "ready", walltime_left_s=3000.0)
    assert world.site.collect(order().id).state == "running"
    assert len(world.scheduler.jobs) == 1
    assert world.alloc(0).inbox() == [order().id]


def test_a_requeue_between_two_looks_is_noticed(world: World) -> None:
    """Protects a job that starts anew, while nobody looked, from being called a hang."""
    world.site.submit(order(), None)
    world.up(0)
    world.site.collect(order().id)
    world.clock.time += 500
    world.job(0, "running", restarts=1)
    assert world.restart().collect(order().id).state == "starting"
    world.worker(0, "loading")
    assert world.site.collect(order().id).state == "starting"
    world.worker(0, "ready")
    assert world.site.collect(order().id).state == "running"
    assert world.restart().collect(order().id).state == "running"
    assert world.scheduler.cancelled == []


def test_a_job_without_a_log(world: World) -> None:
    """Protects a user whose working folder the nodes do not see: Slurm says only FAILED."""
    world.restart(retries=0)
    world.site.acquire()
    world.job(0, "ended", outcome="failed", reason="FAILED (JobLaunchFailure)")
    assert "python -m flwr_hpc.doctor" in world.site.acquire().error


def test_an_unanswered_submission_ends_at_the_deadline(world: World) -> None:
    """Protects against waiting for ever for a scheduler that is gone."""
    world.restart(queue_deadline_s=100.0)
    world.scheduler.refusal = SchedulerUnavailableError("slurmctld does not answer")
    status = world.site.acquire()
    assert (status.state, status.reason) == (
        "queued", "not submitted yet: slurmctld does not answer",
    )  # fmt: skip
    world.clock.time += 50
    assert world.restart().acquire().state == "queued"
    world.clock.time += 60
    status = world.restart().acquire()
    assert (status.state, status.fatal) == ("failed", False)
    assert "queue_deadline_s" in status.error
    assert "slurmctld does not answer" in status.error


def test_what_is_told_of_a_job(world: World) -> None:
    """Protects queue times and node-hours: the scheduler's own times, its end included."""
    world.forecast.expected_s = 100.0
    world.site.submit(order(), None)
    world.job(0, "pending", reason="Priority")
    status = world.site.collect(order().id)
    assert (status.reason, status.queue_wait_s, status.queue_wait_high_s) == (
        "Priority", 50.0, 90.0,
    )  # fmt: skip
    assert status.ledger["a0000"]["queue"] == 31.0
    submitted = status.jobs["a0000"]["submitted_s"]
    world.job(0, "running", nodes=4, eligible_s=submitted + 1, started_s=submitted + 40)
    world.worker(0, "ready")
    assert world.site.collect(order().id).jobs["a0000"] == {
        "id": "1", "nodes": 4, "restarts": 0, "submitted_s": submitted,
        "eligible_s": submitted + 1, "started_s": submitted + 40,
    }  # fmt: skip
    world.done(order())
    world.worker(0, "closed", seconds={"train": 5.0})
    world.site.collect(order().id)  # no word of the scheduler yet
    ended = {"started_s": submitted + 40, "ended_s": submitted + 90, "outcome": "completed"}
    world.job(0, "ended", nodes=4, **ended)
    status = world.site.collect(order().id)
    assert status.jobs["a0000"]["ended_s"] == submitted + 90
    assert status.jobs["a0000"]["outcome"] == "completed"
    assert status.ledger["a0000"] == {"queue": 40.0, "train": 5.0}
    asked = world.scheduler.asked
    world.clock.time += 1000
    world.site.collect(order().id)
    assert world.scheduler.asked == asked  # nothing more to learn


def test_the_forecast_hears_of_every_wait(world: World) -> None:
    """Protects the history of waits."""
    world.restart(queue_deadline_s=100.0)
    world.site.acquire()
    world.job(0, "pending")
    world.site.acquire()
    world.clock.time += 200
    world.site.acquire()
    first = [("submission", "run-fac-a0000"), ("info", "run-fac-a0000", "pending")]
    assert world.forecast.heard[:2] == first
    assert ("cancellation", "run-fac-a0000") in world.forecast.heard
    assert world.site.status_with_forecast().forecast is not None


def test_killed_as_it_cancelled(world: World) -> None:
    """Protects from taking our own cancellation for somebody else's."""
    world.restart(retries=0)
    world.site.acquire()
    world.scheduler.trouble = Killed()
    with pytest.raises(Killed):
        world.site.release()
    world.scheduler.trouble = None
    world.clock.time += 31
    assert world.restart().status().state == "idle"
    verdict = world.alloc(0).verdict.read()
    assert verdict is not None
    assert verdict.why == "cancelled"
    assert world.site.acquire().state == "queued"


def test_allocations_that_leave_without_a_step(world: World) -> None:
    """Protects from an order that no walltime is long enough for: bounded, and explained."""
    world.restart(retries=1)
    world.site.submit(order(), None)
    for number in range(3):
        world.up(number)
        world.worker(number, "closed", seconds={"idle": 1.0})
        status = world.site.collect(order().id)
    assert (status.state, status.fatal) == ("failed", False)
    assert "the walltime has to be long enough" in status.error
    assert len(world.scheduler.jobs) == 3


def test_a_cancelled_job_can_stay_cancelled(world: World) -> None:
    """Protects a user who cancels the job of the batch mod from a new one, now or later."""
    world.restart(replace_cancelled=False)
    world.site.submit(order(1), None)
    world.up(0)
    world.job(0, "ended", outcome="cancelled", reason="CANCELLED by 1000")
    for number in (1, 2):
        world.site.submit(order(number), None)
        status = world.restart().collect(order(number).id)
        assert status.state == "failed"
        assert "cancelled, and not by this run: CANCELLED by 1000 (job 1)" in status.error
        assert "no more jobs are submitted" in status.error
    assert list(world.scheduler.jobs) == ["run-fac-a0000"]


@pytest.mark.parametrize("outcome", ["preempted", "node_fail", "lost"])
def test_other_losses_are_still_replaced(world: World, outcome: str) -> None:
    """Protects runs whose jobs are cancelled by nobody."""
    world.restart(replace_cancelled=False)
    world.site.submit(order(), None)
    world.job(0, "ended", outcome=outcome)
    assert world.site.collect(order().id).allocation == "a0001"


def test_a_withdrawn_order_is_not_begun(world: World) -> None:
    """Protects the budget from work that nobody waits for; what has begun is left alone."""
    world.site.submit(order(), None)
    world.restart().withdraw(order().id)
    assert world.alloc(0).inbox() == []
    world.up(0)
    world.site.submit(order(2), None)
    world.site.withdraw(order(2).id)
    assert world.alloc(0).inbox() == [order(2).id]
