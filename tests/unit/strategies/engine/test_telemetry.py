"""What the engine writes of allocations and jobs: each change once, no poll's repetition."""

from __future__ import annotations

from typing import Any

import pytest

from flwr_hpc.protocol import Order, Result, Status
from strategies.engine.state import SiteState
from strategies.engine.telemetry import Telemetry

JOB = {"id": "7", "nodes": 2, "restarts": 0, "submitted_s": 100.0}


class Bench:
    """A telemetry with a clock of its own, and what it wrote."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[dict[str, Any]] = []
        self.site = SiteState("a", launcher=True, node_id=1)
        self.telemetry = Telemetry(
            lambda event, **f: self.log.append({"event": event, **f}), lambda: self.now
        )

    def say(self, state: str, after_s: float = 30.0, **fields: Any) -> list[dict[str, Any]]:
        """Answer a poll and return the events it made."""
        before, self.now = len(self.log), self.now + after_s
        fields = {"allocation": "a0000", "jobs": {"a0000": JOB}, **fields}
        self.telemetry.allocation(self.site, Status(state, **fields))  # type: ignore[arg-type]
        return self.log[before:]


def test_a_queued_allocation_is_told_with_forecast_and_reason_once() -> None:
    """A wait of hours is a handful of lines, however often the site is asked."""
    bench = Bench()
    waits = {"queue_wait_s": 700.0, "queue_wait_high_s": 2400.0, "reason": "Priority"}
    (event,) = bench.say("queued", **waits)
    assert {k: event[k] for k in waits} == waits
    assert event["jobs"] == {"a0000": JOB}
    for _ in range(10):  # the wait that is left shrinks as time goes by
        waits["queue_wait_s"] -= 30.0
        assert bench.say("queued", **waits) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"reason": "Resources"}, {"reason": "Resources"}),
        ({"queue_wait_s": 4000.0}, {"queue_wait_s": 4000.0}),
        ({"queue_wait_s": None}, {"queue_wait_s": None}),
        ({"jobs": {"a0000": {**JOB, "restarts": 1}}}, {"jobs": {"a0000": {**JOB, "restarts": 1}}}),
        ({"queue_wait_s": 1010.0}, None),  # 40 s later than thought: no news
    ],
)
def test_what_changes_is_told(change: dict[str, Any], told: dict[str, Any] | None) -> None:
    """A new reason, a start that moves, a requeue: one event each."""
    bench = Bench()
    waits = {"queue_wait_s": 1000.0, "reason": "Priority"}
    bench.say("queued", **waits)
    events = bench.say("queued", **{**waits, **change})
    assert len(events) == (told is not None)
    assert told is None or told.items() <= events[0].items()


def test_a_successor_is_told_while_its_predecessor_works() -> None:
    """The report shows it queueing before anybody waits for it; known jobs are not repeated."""
    bench = Bench()
    ended = {**JOB, "outcome": "completed"}
    bench.say("ready", jobs={"old": ended, "a0000": JOB})
    assert bench.say("running", jobs={"old": ended, "a0000": JOB}) == []
    successor = {"id": "8", "submitted_s": 300.0}
    (event,) = bench.say("running", jobs={"old": ended, "a0000": JOB, "a0001": successor})
    assert (event["allocation"], event["state"]) == ("a0000", "ready")
    assert event["jobs"] == {"a0000": JOB, "a0001": successor}


def test_a_finished_order_tells_jobs_and_ledger() -> None:
    """Of its allocation always, of others when there is news; the last word names the next."""
    bench = Bench()
    ledger = {"old": {"train": 9.0}, "a0000": {"train": 1.0}}
    bench.say("ready", ledger=ledger)
    order = Order("k", "a", 0, "train", steps=5)
    result = Result(order.id, "done", steps=5, seconds={"train": 4.0})
    ledger = {"old": {"train": 9.0}, "a0000": {"train": 5.0}}
    jobs = {"a0000": JOB, "a0001": {"id": "8"}}
    done = Status("done", allocation="a0001", jobs=jobs, ledger=ledger, result=result)
    bench.telemetry.allocation(bench.site, done)
    bench.telemetry.done(order, {}, done, 6.0)
    assert [(e["event"], e.get("state")) for e in bench.log[1:]] == [
        ("allocation", "ended"), ("allocation", "ready"), ("order_done", None),
    ]  # fmt: skip
    assert "ledger" not in bench.log[1]
    assert bench.log[-1]["ledger"] == {"a0000": {"train": 5.0}}
    assert bench.log[-1]["jobs"] == jobs


def test_a_failure_still_tells_how_the_job_ended() -> None:
    """The outcome of a job reaches the log although no allocation is left."""
    bench = Bench()
    bench.say("ready")
    (event,) = bench.say("failed", allocation="", jobs={"a0000": {**JOB, "outcome": "timeout"}})
    assert event["jobs"]["a0000"]["outcome"] == "timeout"
    assert (event["allocation"], event["state"]) == ("a0000", "ready")


def test_a_facility_without_allocations_writes_none() -> None:
    """Somebody else's site, or one that has not asked for a job."""
    bench = Bench()
    assert bench.say("idle", allocation="", jobs={}) == []
