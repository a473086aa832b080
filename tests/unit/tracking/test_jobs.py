"""What jobs cost: by the scheduler's times, and what was lost with them."""

from __future__ import annotations

from typing import Any

import pytest
from worlds.tracking.job_events import job_events

from flwr_hpc.tracking import accounts, state, timeline
from flwr_hpc.tracking.accounts import Accounts
from flwr_hpc.tracking.jobs import Job, order_of
from flwr_hpc.tracking.report.summary import summarize
from flwr_hpc.tracking.state import fold_all
from flwr_hpc.tracking.text import node_hours_line
from flwr_hpc.tracking.timeline import Timeline, totals

RUNNING = {"id": "7", "nodes": 2, "submitted_s": 100.0, "eligible_s": 110.0, "started_s": 400.0}
ENDED = {**RUNNING, "ended_s": 1000.0}


def accounted(said: dict[str, Any], ledger: dict[str, float]) -> Accounts:
    found = Accounts()
    found.take({"a0": ledger}, {"a0": said})
    found.count_lost(["a0"])
    return found


def hours(found: Accounts) -> dict[str, float]:
    node_hours = found.node_hours()
    assert node_hours is not None
    return {k: round(v * 3600) for k, v in node_hours.items()}


def test_used_is_nodes_times_the_schedulers_time() -> None:
    """Not what the worker accounts for: the node was taken before and after it too."""
    found = accounted({**ENDED, "outcome": "completed"}, {"queue": 300, "train": 500, "idle": 50})
    assert hours(found) == {"used": 1200, "idle": 100, "lost": 0, "from_ledger": 0}
    assert found.queue_waits() == [300.0]


def test_without_the_schedulers_word_the_ledger_counts_and_that_is_said() -> None:
    """A job that still runs, and a scheduler without accounting."""
    ledger = {"queue": 300.0, "load": 10.0, "train": 90.0}
    assert hours(accounted(RUNNING, ledger))["used"] == 200
    alone = hours(accounted({}, ledger))
    assert alone == {"used": 100, "idle": 0, "lost": 0, "from_ledger": 100}


def test_nothing_known_is_not_zero() -> None:
    """No allocation, no node-hours."""
    assert Accounts().node_hours() is None


@pytest.mark.parametrize("outcome", ["preempted", "node_fail", "failed", "timeout", ""])
def test_work_of_an_unfinished_order_is_lost_with_its_job(outcome: str) -> None:
    """What was finished before is not, and neither is idle or loading time."""
    found = accounted(RUNNING, {"load": 50, "train": 100})
    found.order_done("train", ["a0"], {"train": 100})
    found.take({"a0": {"load": 50, "train": 130, "evaluate": 20, "idle": 40}}, {})
    found.take({}, {"a0": {**ENDED, "outcome": outcome}})
    found.count_lost(["a0"])
    found.count_lost(["a0"])  # told again
    assert hours(found)["lost"] == 2 * 50


def test_what_a_checkpoint_saved_is_not_lost() -> None:
    """The order that goes on says how much of it came from before."""
    found = accounted({**ENDED, "outcome": "preempted"}, {"train": 100})
    assert hours(found)["lost"] == 200
    found.take({"a1": {"train": 30}}, {"a1": {"nodes": 1}})
    found.order_done("evaluate", ["a1"], {"evaluate": 1})
    found.order_done("train", ["a1", "a0"], {"train": 30, "resumed": 80})
    assert hours(found)["lost"] == 40
    found.order_done("train", ["a1", "a0"], {"train": 30, "resumed": 80})
    assert hours(found)["lost"] == 40


def test_a_finished_order_is_credited_to_the_job_that_worked_on_it() -> None:
    """Its last word may come when the successor has taken over already."""
    found = accounted(RUNNING, {"train": 100})
    found.take({"a1": {"train": 0}}, {"a1": {"nodes": 1}})
    found.order_done("train", ["a1", "a0"], {"train": 100})
    found.take({}, {"a0": {**ENDED, "outcome": "timeout"}})
    found.count_lost(["a0"])
    assert hours(found)["lost"] == 0


def test_a_requeued_job_has_a_stay_and_a_worker_for_every_start() -> None:
    """Its time, its waits and its ledger add up; the new worker's counts from zero."""
    job = Job("a0")
    job.update(RUNNING)
    job.account({"queue": 300, "load": 20, "train": 50})
    job.update({**ENDED, "restarts": 1})  # waits again; its new times are not known yet
    assert job.pending
    assert job.bad_ends == 1
    again = {"submitted_s": 1000.0, "eligible_s": None, "started_s": 1600.0, "ended_s": None}
    first = {k: ENDED[k] for k in again}
    job.update({"id": "7", "nodes": 2, "restarts": 1, "cycles": [first, again], **again})
    job.account({"queue": 900, "load": 21, "train": 1})
    assert not job.pending
    assert not job.ended
    assert [s.started_s for s in job.cycles] == [400.0, 1600.0]
    assert job.waits == [300.0, 600.0]
    assert job.seconds() == {"queue": 900, "load": 41, "train": 51}
    assert job.used() == (2 * (600 + 22), 2 * 22)


def test_a_requeue_ends_the_stay_before_it() -> None:
    """Where the scheduler forgets the first start, the new submission tells its end."""
    job = Job("a0")
    for said in (RUNNING, {**RUNNING, "submitted_s": 700.0, "started_s": 900.0, "restarts": 1}):
        job.update(said)
    assert [(s.started_s, s.ended_s) for s in job.cycles] == [(400.0, 700.0), (900.0, None)]


def test_the_summary_tells_node_hours_and_waits() -> None:
    """By hand from the made-up run: what each job took, had idle and lost."""
    summary = summarize(fold_all(job_events()))
    leonardo = summary["facilities"]["leonardo"]
    used = 4 * ((3308 - 605) + (3800 - 2500) + 540) / 3600
    assert leonardo["node_hours"]["used"] == pytest.approx(used, abs=1e-3)
    assert leonardo["node_hours"]["lost"] == pytest.approx(4 * 100 / 3600, abs=1e-3)
    assert leonardo["queue_wait_s"] == {"starts": 3, "median": 600.0, "max": 900.0}
    lumi = summary["facilities"]["lumi"]
    assert lumi["node_hours"]["lost"] == pytest.approx(2 * 500 / 3600, abs=1e-3)
    assert summary["facilities"]["other"]["queue_wait_s"] is None
    assert "leonardo 5.05 (0.48 idle, 0.11 lost)" in node_hours_line(summary)


def test_names_are_ordered_beyond_four_digits() -> None:
    """Allocations are numbered; the ten thousandth comes last."""
    assert sorted(["a10000", "a9999", "a0001"], key=order_of) == ["a0001", "a9999", "a10000"]


def test_memory_does_not_grow_with_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job for every round for a year: old ones are summed up, and not counted twice."""
    monkeypatch.setattr(accounts, "MOST", 5)
    found = Accounts()
    for i in range(50):
        name = f"a{i:04d}"
        found.take({name: {"train": 100.0}}, {name: {**ENDED, "outcome": "completed"}})
        found.order_done("train", [name], {"train": 100.0})
        found.count_lost([name])
    found.take({"a0003": {"train": 100.0}}, {"a0003": ENDED})  # a server that begins anew
    assert len(found.jobs) == 5
    assert found.allocations == found.starts == 50
    assert hours(found) == {"used": 50 * 1200, "idle": 0, "lost": 0, "from_ledger": 0}
    assert found.seconds()["train"] == 5000


def test_memory_does_not_grow_with_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curve and timeline get coarser with age; sums and the newest points stay exact."""
    monkeypatch.setattr(state, "MOST_POINTS", 100)
    monkeypatch.setattr(state, "MOST_DONE", 10)
    monkeypatch.setattr(timeline, "MOST", 200)
    events = [{"event": "run_started", "s": 0.0}]
    for i in range(1000):
        order = {"order_id": f"o{i}", "facility": "a", "kind": "train", "steps": 1}
        metrics = {"train_loss": float(i)}
        seconds = {"train": 3.0}
        events += [
            {"event": "order_sent", "s": 4.0 * i, **order},
            {"event": "order_done", "s": 4.0 * i + 3, "metrics": metrics, "seconds": seconds,
             **order},
        ]  # fmt: skip
    f = fold_all(events).facilities["a"]
    assert len(f.train_loss) <= 100
    assert f.train_loss[-1][1:] == (1000, 999.0)
    assert len(f.done) == 10
    assert len(f.timeline.intervals) <= 200
    assert f.timeline.end_s == 3999
    assert totals(f.timeline.intervals)["train"] == pytest.approx(3000)


def test_a_coarser_timeline_has_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every moment has one phase, however old."""
    monkeypatch.setattr(timeline, "MOST", 90)
    line = Timeline()
    for i in range(1, 500):
        line.extend(float(i), "train" if i % 2 else "idle")
    assert all(a[1] == b[0] for a, b in zip(line.intervals, line.intervals[1:], strict=False))
