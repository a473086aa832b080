"""The state folded from events is what really happened."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from worlds.tracking.events import run_events

from flwr_hpc.tracking.records import FacilityState, RunState
from flwr_hpc.tracking.report.summary import summarize
from flwr_hpc.tracking.state import fold, fold_all
from flwr_hpc.tracking.text import describe, outlook
from flwr_hpc.tracking.timeline import Timeline, order_parts, totals

Event = dict[str, Any]


def ev(s: float, event: str, facility: str | None = "a", **fields: Any) -> Event:
    base = {"t": 1000.0 + s, "s": s, "event": event}
    return {**base, **({"facility": facility} if facility else {}), **fields}


def started(s: float = 0.0, version: int = 0, resumed: bool = False) -> Event:
    return ev(s, "run_started", None, run_key="k", strategy="DiLoCo", rounds=3,
              facilities=["a"], version=version, resumed=resumed)  # fmt: skip


def sent(s: float, seq: int, version: int = 0, **more: Any) -> Event:
    order = {"order_id": f"k-a-{seq}", "kind": "train", "version": version, "steps": 10}
    return ev(s, "order_sent", **{**order, **more})


def done(s: float, seq: int, version: int = 0, **more: Any) -> Event:
    order = {"order_id": f"k-a-{seq}", "kind": "train", "version": version, "steps": 10}
    return ev(s, "order_done", **{**order, "tokens": 100, **more})


def allocation(s: float, state: str, name: str = "x1") -> Event:
    return ev(s, "allocation", allocation=name, state=state)


def a(events: list[Event]) -> FacilityState:
    return fold_all(events).facilities["a"]


def test_states_of_a_facility_follow_its_events() -> None:
    """Each event leaves the facility in the state that a person would name."""
    script = [
        (started(), "offline"),
        (ev(1, "site_online"), "idle"),
        (allocation(2, "queued"), "queued"),
        (allocation(5, "queued"), "queued"),
        (allocation(9, "starting"), "starting"),
        (allocation(11, "ready"), "ready"),
        (sent(12, 0), "training"),
        (ev(13, "order_progress", order_id="k-a-0", step=1, steps=10), "training"),
        (done(20, 0), "ready"),
        (sent(21, 1, kind="evaluate"), "evaluating"),
        (ev(22, "order_progress", order_id="k-a-1", step=1, steps=4), "evaluating"),
        (done(23, 1, kind="evaluate"), "ready"),
        (allocation(24, "ended"), "idle"),
        (ev(25, "site_offline"), "offline"),
        (ev(26, "run_finished", None, status="finished"), "done"),
    ]
    state, seen = RunState(), []
    for event, _ in script:
        fold(state, event)
        seen.append(state.facilities["a"].state)
    assert seen == [name for _, name in script]


def test_a_site_that_is_left_out_says_why() -> None:
    """View, report and summary name the reason, also after the run; another node is welcome."""
    refusal = ev(3, "site_excluded", reason="Slurm refused the job:\n invalid account")
    events = [started(), ev(1, "site_online"), ev(2, "order_failed", fatal=True), refusal]
    end = ev(9, "run_finished", None, status="finished")
    f = a([*events, end])
    assert f.state == "excluded"
    assert outlook(f, 9.0) == "left out of the run: Slurm refused the job: invalid account"
    assert describe(refusal) == "a: left out of the run: Slurm refused the job: invalid account"
    assert (3, "excluded", refusal["reason"]) in f.marks
    summary = summarize(fold_all([*events, end]))["facilities"]["a"]
    assert summary["excluded"] == refusal["reason"]
    back = a([*events, ev(5, "site_online"), end])
    assert (back.state, back.excluded) == ("done", "")


def test_payloads_on_their_way_are_told_with_their_rate() -> None:
    """Protects whoever waits for gigabytes over a slow line."""
    half = {"bytes": 20_000_000, "total": 40_000_000, "mb_per_s": 2.5, "seconds": 8.0, "again": 0}
    part = ev(3, "transfer", way="to_site", **half)
    whole = ev(4, "transfer", way="to_site",
               **{**half, "bytes": 40_000_000, "seconds": 16.0, "again": 300_000})  # fmt: skip
    assert outlook(a([started(), part]), 9.0) == "20 of 40 MB to the site at 2.5 MB/s, 8 s left"
    assert outlook(a([started(), part, whole]), 9.0) == ""
    assert describe(part) == "a: 20 of 40 MB to the site at 2.5 MB/s, 8 s left"
    assert describe(whole) == "a: 40 MB to the site in 16 s, 2.5 MB/s, 0.3 MB of it twice"
    lost = ev(5, "order_failed", order_id="k-a-0", reason="no reply")
    assert outlook(a([started(), part, lost]), 9.0) == ""
    shards = [ev(3, "transfer", way="to_site", **half, payload=name) for name in ("one", "other")]
    together = "40 of 80 MB to the site at 5.0 MB/s, 8 s left"
    assert outlook(a([started(), *shards]), 9.0) == together


def test_totals_count_each_finished_order_once() -> None:
    """An order that a resumed session collects again is not counted again."""
    events = [started(), sent(1, 0), done(5, 0), started(5, resumed=True), sent(6, 0), done(7, 0)]
    f = a(events)
    assert (f.orders, f.steps, f.tokens) == (1, 10, 100)
    assert fold_all(events).sessions == [0, 5]


def test_evaluation_orders_add_no_training_steps() -> None:
    """Steps, tokens and orders are those of training."""
    f = a([started(), sent(1, 0), done(5, 0, kind="evaluate")])
    assert (f.orders, f.steps, f.tokens) == (0, 0, 0)


def test_losses_are_kept_by_version_and_by_steps() -> None:
    """Held-out losses stand at the moment their version came to be."""
    events = [
        started(),
        sent(1, 0),
        ev(2, "order_progress", order_id="k-a-0", step=5, steps=10, loss=5.0),
        done(4, 0, metrics={"held_out_loss": 6.0, "train_loss": 4.5}),
        ev(5, "aggregated", None, version=1, staleness={"a": 2}),
        sent(6, 1, version=1),
        done(9, 1, version=1, metrics={"held_out_loss": 4.0, "train_loss": 3.5}),
        ev(10, "aggregated", None, version=2, staleness={"a": 0}),
        ev(12, "evaluated", version=2, held_out_loss=3.0),
    ]
    f = a(events)
    assert f.held_out_curve == [(1, 0, 6.0), (5, 1, 4.0), (10, 2, 3.0)]
    assert f.train_loss == [(2, 5, 5.0), (4, 10, 4.5), (9, 20, 3.5)]
    assert (f.merged, f.staleness) == (2, 2)


def test_steps_trained_again_replace_their_points() -> None:
    """After a failure the curve goes on from where it was, not back and forth."""
    progress = {"order_id": "k-a-0", "steps": 10}
    events = [
        started(),
        sent(1, 0),
        ev(2, "order_progress", **progress, step=4, loss=5.0),
        ev(3, "order_progress", **progress, step=8, loss=4.0),
        ev(4, "order_failed", order_id="k-a-0", reason="node failure"),
        sent(5, 0),
        ev(6, "order_progress", **progress, step=4, loss=5.1),
    ]
    f = a(events)
    assert f.train_loss == [(6, 4, 5.1)]
    assert f.failed == 1
    assert f.marks == [(4, "failed", "node failure")]


def test_a_round_trip_is_laid_from_one_hosts_durations() -> None:
    """Edges are the server's, the inside is the worker's, what is left is transfer."""
    f = a([
        started(),
        ev(2, "site_online"),
        sent(10, 0),
        done(30, 0, seconds={"read": 1, "evaluate": 2, "train": 12, "write": 1, "first_step": 3}),
    ])  # fmt: skip
    assert f.intervals(32.0) == [
        (0.0, 10, "idle"),
        (10, 13, "transfer"),
        (13, 15, "evaluate"),
        (15, 27, "train"),
        (27, 30, "transfer"),
        (30, 32.0, "idle"),
    ]


def test_durations_longer_than_the_round_trip_are_scaled() -> None:
    """A job that went on while the server was down does not push the timeline ahead."""
    f = a([started(), sent(10, 0), done(20, 0, seconds={"train": 100})])
    assert f.intervals(20.0) == [(0.0, 10, "idle"), (10, 20, "train")]


def test_the_wait_for_an_allocation_is_divided_by_its_ledger() -> None:
    """The server sees the wait from outside; queue, start-up and load come from the ledger."""
    ledger = {"x1": {"queue": 20, "startup": 10, "load": 10, "train": 4}}
    f = a([
        started(),
        allocation(10, "queued"),
        allocation(50, "ready"),
        sent(50, 0),
        done(54, 0, seconds={"train": 4}, ledger=ledger),
    ])  # fmt: skip
    assert f.intervals(54.0) == [
        (0.0, 10, "idle"),
        (10, 30.0, "queue"),
        (30.0, 40.0, "startup"),
        (40.0, 50.0, "load"),
        (50.0, 54, "train"),
    ]
    assert f.seconds() == {**dict.fromkeys(totals([]), 0.0), **ledger["x1"]}


def test_a_wait_that_nobody_reported_is_laid_before_the_allocation_was_ready() -> None:
    """Sites answer late: the first word may be 'ready', and the ledger tells what was before."""
    ledger = {"x1": {"queue": 5, "startup": 3, "load": 2}}
    f = a([
        started(),
        allocation(30, "ready"),
        sent(31, 0),
        done(35, 0, seconds={"train": 4}, ledger=ledger),
    ])  # fmt: skip
    assert f.intervals(35.0) == [
        (0.0, 20.0, "idle"),
        (20.0, 25.0, "queue"),
        (25.0, 28.0, "startup"),
        (28.0, 30.0, "load"),
        (30.0, 31, "idle"),
        (31, 35.0, "train"),
    ]


def test_a_wait_is_not_laid_over_an_earlier_session() -> None:
    """An allocation that a resumed session finds may have queued while the first one worked."""
    f = a([
        started(),
        allocation(5, "ready"),
        sent(5, 0),
        started(10, resumed=True),
        allocation(12, "ready", "x2"),
        sent(12, 0),
        done(14, 0, seconds={"train": 2}, ledger={"x2": {"queue": 8}}),
    ])  # fmt: skip
    assert f.intervals(14.0) == [
        (0.0, 5, "idle"),
        (5, 10, "train"),
        (10, 12.0, "queue"),
        (12, 14.0, "train"),
    ]


def test_a_train_message_that_waits_for_its_allocation_shows_the_wait() -> None:
    """Under a strategy that knows nothing of allocations the order's ledger tells of them."""
    ledger = {"x1": {"queue": 10, "startup": 2, "load": 3}}
    f = a([started(), sent(0, 0), done(20, 0, seconds={"train": 5}, ledger=ledger)])
    assert totals(f.intervals(20.0)) == pytest.approx(
        {"queue": 10, "startup": 2, "load": 3, "train": 5, "evaluate": 0, "transfer": 0, "idle": 0}
    )


def test_pipelined_orders_share_the_time() -> None:
    """Two orders in flight are laid one after the other."""
    f = a([
        started(), sent(0, 0), sent(5, 1), done(10, 0, seconds={"train": 10}),
        done(20, 1, seconds={"train": 10}),
    ])  # fmt: skip
    assert f.intervals(20.0) == [(0.0, 20, "train")]


def test_a_replaced_allocation_adds_to_the_ledger() -> None:
    """Ledgers are totals per allocation: the newest counts, and allocations add up."""
    f = a([
        started(), sent(0, 0), done(5, 0, ledger={"x1": {"train": 3}}), sent(5, 1),
        done(9, 1, ledger={"x1": {"train": 4}, "x2": {"train": 2, "queue": 1}}),
    ])  # fmt: skip
    assert f.accounted()["train"] == 6
    assert f.accounted()["queue"] == 1


def test_unknown_and_malformed_events_are_ignored() -> None:
    """Older code reads newer logs."""
    state = fold_all([
        started(),
        ev(1, "from_the_future", colour="blue"),
        ev(2, "order_done", None),
        ev(3, "order_done", order_id="q", metrics=None, seconds="?", ledger={"x": None}),
        {"event": "evaluated", "facility": "a", "held_out_loss": None},
        ev(4, "order_progress", order_id="r", step=None, loss=None),
        ev(5, "aggregated", None, version=1, staleness=None),
    ])  # fmt: skip
    assert state.version == 1
    assert state.wall_s == 5
    assert state.facilities["a"].held_out == {}


def test_the_global_curve_is_the_mean_over_facilities() -> None:
    """A facility that skipped a version counts with the line between its neighbours."""
    state = RunState()
    told = [(0, "a", 6.0), (0, "b", 8.0), (1, "a", 5.0), (2, "a", 4.0), (2, "b", 6.0)]
    for version, name, loss in told:
        fold(state, ev(version, "evaluated", name, version=version, held_out_loss=loss))
    assert state.held_out_curve() == [(0, 0, 7.0), (1, 1, 6.0), (2, 2, 5.0)]
    assert RunState().held_out_curve() == []


def test_timelines_have_no_gap_and_no_overlap() -> None:
    """From the first second to the last, whatever happened."""
    state = fold_all(run_events(4, 12))
    for f in state.facilities.values():
        intervals = f.intervals(state.wall_s)
        assert intervals[0][0] == 0.0
        assert intervals[-1][1] == pytest.approx(state.wall_s)
        assert all(left[1] == right[0] for left, right in pairwise(intervals))
        assert all(start < end for start, end, _ in intervals)


def test_summary_names_everything_and_invents_nothing() -> None:
    """The keys that others read are there; what is unknown is null."""
    summary = summarize(fold_all(run_events(3, 12)), {"model": "m", "versions": None})
    assert summary["status"] == "finished"
    assert summary["strategy"] == "DiLoCo"
    assert summary["versions"] == 12
    assert summary["model"] == "m"
    assert summary["wall_s"] > 0
    jupiter = summary["facilities"]["jupiter"]
    assert jupiter["held_out_loss_first"] > jupiter["held_out_loss_last"] > 0
    assert (jupiter["steps"], jupiter["orders"], jupiter["failed"]) == (480, 12, 1)
    assert set(jupiter["seconds"]) == {
        "queue", "startup", "load", "train", "evaluate", "transfer", "idle"
    }  # fmt: skip
    leonardo = summary["facilities"]["leonardo"]
    assert (leonardo["rejected"], leonardo["failed"]) == (1, 0)  # a rejection is no failure too

    empty = summarize(fold_all([started()]))
    assert empty["model"] is None
    assert empty["facilities"]["a"]["held_out_loss_first"] is None
    assert empty["facilities"]["a"]["seconds"] is None


def test_timeline_relay_keeps_what_lies_around() -> None:
    """Only the given stretch is divided anew."""
    timeline = Timeline()
    for until, phase in ((10, "idle"), (20, "queue"), (30, "idle")):
        timeline.extend(until, phase)
    timeline.relay(10, 20, [("queue", 1), ("load", 1)])
    timeline.relay(5, 5, [("train", 1)])
    timeline.relay(5, 8, [])
    assert timeline.intervals == [
        (0.0, 10, "idle"), (10, 15, "queue"), (15, 20, "load"), (20, 30, "idle")
    ]  # fmt: skip


def test_a_client_without_durations_counts_as_training() -> None:
    """Somebody else's ClientApp tells no seconds."""
    assert dict(order_parts({}, {}, 8.0))["train"] == 8.0
