"""Every allocation is where it was, in a lane of its own while another lives."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from worlds.tracking.events import run_events, write_log
from worlds.tracking.job_events import T0, job_events

from flwr_hpc.report import main
from flwr_hpc.tracking.report.lanes import Lane, lanes
from flwr_hpc.tracking.state import fold_all


def lanes_of(facility: str, events: list[dict[str, object]] | None = None) -> list[Lane]:
    state = fold_all(events or job_events())
    return lanes(state, state.facilities[facility], state.wall_s)


def first(lane: Lane, phase: str, name: str) -> tuple[float, float]:
    return next((start, end) for start, end, p, n in lane if (p, n) == (phase, name))


def test_a_successor_queues_and_loads_beside_its_predecessor() -> None:
    """Two lanes, because two allocations lived at once; the second takes over where it was."""
    old, new = lanes_of("leonardo")
    assert {n for *_, n in old} == {"a0000"}
    assert {n for *_, n in new} == {"a0001"}
    assert first(old, "queue", "a0000") == (5.0, 605.0)
    assert first(new, "queue", "a0001") == (1600.0, 2500.0)
    assert first(new, "load", "a0001") == (2520.0, 2620.0)
    assert any(p == "train" and start < 2620.0 < end for start, end, p, _ in old)
    assert not any(p == "train" for start, end, p, _ in new if end <= 3310.0)


def test_a_requeued_job_shows_its_second_queue_phase() -> None:
    """Preempted, queued again, started again, in the same lane."""
    _, new = lanes_of("leonardo")
    phases = [p for start, _, p, _ in new if start >= 3310.0]
    assert phases[0] == "train"
    assert phases[1:4] == ["queue", "startup", "load"]
    assert [(s, e) for s, e, p, _ in new if p == "queue"][1] == (3800.0, 4400.0)


def test_a_job_that_waits_again_is_shown_while_it_does() -> None:
    """The report of a run that goes on, at the moment of the requeue."""
    events = [e for e in job_events() if e["s"] <= 4000]
    _, new = lanes_of("leonardo", events)
    assert new[-1][2] == "queue"
    assert new[-1][0] == 3800.0


def test_a_clock_that_is_wrong_by_an_hour_is_put_right() -> None:
    """Nothing is told before it has happened: so the clock must be ahead by that much."""
    (lane,) = lanes_of("lumi")
    start, end = first(lane, "queue", "a0000")
    assert end - start == pytest.approx(1000, abs=10)
    assert start == pytest.approx(5, abs=10)
    assert [n for *_, n in lane] == sorted(n for *_, n in lane)  # one after the other


def test_lanes_do_not_overlap_and_hold_the_work() -> None:
    """Whatever the moment at which the log ends."""
    events = job_events()
    for cut in range(1, len(events)):
        state = fold_all(events[:cut])
        for f in state.facilities.values():
            for lane in lanes(state, f, state.wall_s):
                assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(lane))
                assert all(start < end <= state.wall_s for start, end, *_ in lane)


def test_without_times_of_a_scheduler_there_is_one_lane() -> None:
    """A log of before, or somebody else's site: the facility's timeline."""
    state = fold_all(run_events(2, 4))
    for f in state.facilities.values():
        (lane,) = lanes(state, f, state.wall_s)
        assert [span[:3] for span in lane] == f.intervals(state.wall_s)


def test_a_run_that_ends_before_anything_was_told() -> None:
    """Ctrl-C while the first job is still in the queue: its job is known, what it did is not."""
    job = {"id": "8", "submitted_s": T0 + 7}
    events = [
        {"event": "run_started", "facilities": ["a"], "t": T0, "s": 0.0},
        {"event": "site_online", "facility": "a", "t": T0 + 3, "s": 3.0},
        {"event": "run_finished", "t": T0 + 20, "s": 20.0, "status": "interrupted"},
        {"event": "jobs_ended", "facility": "a", "t": T0 + 21, "s": 21.0, "jobs": {"a0": job},
         "ledger": {"a0": {"queue": 0.0}}},
    ]  # fmt: skip
    ((span,),) = lanes_of("a", events)
    assert span[2:] == ("queue", "a0")


def test_the_pause_between_two_sessions_takes_no_room() -> None:
    """Jobs that ran while nobody ran the run end at its seam."""
    start = {"event": "run_started", "facilities": ["a"]}
    job = {"submitted_s": T0 + 10, "started_s": T0 + 20}
    told = {"event": "allocation", "facility": "a", "allocation": "a0"}
    events = [
        {**start, "t": T0, "s": 0.0},
        {**told, "t": T0 + 30, "s": 30.0, "state": "starting", "jobs": {"a0": job}},
        {**start, "t": T0 + 10_000, "s": 40.0},
        {**told, "t": T0 + 10_050, "s": 90.0, "state": "ended",
         "jobs": {"a0": {**job, "ended_s": T0 + 5_000, "outcome": "completed"}}},
        {"event": "run_finished", "t": T0 + 10_060, "s": 100.0, "status": "finished"},
    ]  # fmt: skip
    (lane,) = lanes_of("a", events)
    assert lane[-1][1] == 40.0


def test_the_report_draws_lanes_and_node_hours(tmp_path: Path) -> None:
    """Bands of one facility at two heights, named by their allocation."""
    write_log(tmp_path / "events.jsonl", job_events())
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    bands = re.findall(r'<rect class="(\w+)" x="[\d.]+" y="([\d.]+)"[^>]*data-tip="(a\d+) ', text)
    assert len({y for _, y, name in bands}) == 3  # leonardo's two, lumi's one
    assert ("queue", bands[0][1], "a0000") in bands
    assert "lane for each allocation" in text
    assert "<h2>Node-hours</h2>" in text
    assert "5.05" in text
