"""The live view tells the same story to a terminal and to a log file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from worlds.clock import FakeClock
from worlds.tracking.events import run_events
from worlds.tracking.job_events import job_events

from flwr_hpc.tracking.live import LiveView
from flwr_hpc.tracking.state import fold_all
from flwr_hpc.tracking.text import about, compact, describe, duration, hours, outlook

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def console(*, terminal: bool, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=40)


def output(c: Console) -> str:
    assert isinstance(c.file, io.StringIO)
    return c.file.getvalue()


def test_without_a_terminal_each_noteworthy_event_is_one_plain_line() -> None:
    """No control codes, no wrapping, no line per progress report."""
    c = console(terminal=False, width=40)
    events = run_events(2, 6)
    with LiveView(c, 6, ["leonardo", "jupiter"]) as view:
        view.update(events)
    text = output(c)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) < len(events)
    assert "leonardo: reply rejected: 'lm_head.weight' holds NaN" in text
    assert text.count("lm_head") == 1
    assert text.count("held-out loss") == 2  # of the last version; the others stand with orders
    assert "jupiter: order failed: allocation ended" in text
    assert "version 6 aggregated from leonardo, jupiter" in text
    assert lines[-1].endswith("run finished")


def test_a_site_that_has_joined_tells_the_time_of_its_own() -> None:
    """Protects a site's log: no server's event says there how late it is."""
    c, clock = console(terminal=False), FakeClock()
    with LiveView(c, 6, ["lumi"], clock=clock.now) as view:
        clock.sleep(70.0)
        view.update([{"event": "order_progress", "facility": "lumi", "step": 1, "steps": 2}])
        clock.sleep(20.0)
        view.print_line("supernode-lumi ended")
    assert "[    70.0 s] lumi: step 1/2" in output(c)
    assert "[    90.0 s] supernode-lumi ended" in output(c)


def test_a_long_transfer_is_told_once_a_minute_and_at_its_end() -> None:
    """Protects a log file from a line every five seconds."""
    c = console(terminal=False)
    start = {"t": 0.0, "s": 0.0, "event": "run_started", "facilities": ["a"], "rounds": 1}
    size = {"total": 1_000_000_000, "mb_per_s": 2.0, "seconds": 500.0, "again": 0}
    moves = [
        {"t": s, "s": s, "event": "transfer", "facility": "a", "way": "to_site",
         "bytes": 2_000_000 * s, **size} for s in range(5, 505, 5)
    ]  # fmt: skip
    with LiveView(c, 1) as view:
        view.update([start, *moves])
    told = [line for line in output(c).splitlines() if "MB/s" in line]
    assert len(told) == 500 // 60 + 1
    assert "1,000 MB to the site in 8 min 20 s, 2.0 MB/s" in told[-1]


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_a_terminal_that_wants_plain_text_gets_it(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """NO_COLOR and TERM=dumb are respected."""
    monkeypatch.setenv(variable, {"NO_COLOR": "1", "TERM": "dumb"}[variable])
    c = console(terminal=True)
    with LiveView(c, 6, ["leonardo"]) as view:
        view.update(run_events(1, 2))
    assert "\x1b" not in output(c)


def test_a_waiting_allocation_is_told_once() -> None:
    """Every long poll answers 'queued' again; that is no news."""
    c = console(terminal=False)
    queued = {"s": 1.0, "event": "allocation", "facility": "a", "allocation": "x",
              "state": "queued"}  # fmt: skip
    with LiveView(c, 6, ["a"]) as view:
        view.update([{**queued, "s": float(s)} for s in range(50)])
    assert len(output(c).splitlines()) == 1


def test_earlier_sessions_are_known_but_not_told_again() -> None:
    """After a resume the progress goes on, and the screen is not flooded."""
    events = run_events(1, 4, resume_at=2)
    again = next(i for i, e in enumerate(events) if e.get("resumed"))
    c = console(terminal=False)
    with LiveView(c, 4, ["leonardo"]) as view:
        view.restore(events[:again])
        assert output(c) == ""
        view.update(events[again : again + 1])
    assert "run resumed at version 2" in output(c)
    assert view.state.rounds_done == 2
    assert view.state.facilities["leonardo"].steps == 80


def test_a_long_order_gives_a_sign_of_life_each_minute() -> None:
    """A log file of an hour's order is not silent, and not full."""
    c = console(terminal=False)
    events = [
        {"s": float(s), "event": "order_progress", "facility": "a", "order_id": "o", "step": s,
         "steps": 600, "loss": None} for s in range(1, 600)
    ]  # fmt: skip
    with LiveView(c, 6, ["a"]) as view:
        view.update(events)
    assert 8 <= len(output(c).splitlines()) <= 10


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_each_facility_and_the_progress(width: int) -> None:
    """State, step, losses and rate stand in the table, at any usual width."""
    c = console(terminal=True, width=width)
    events = run_events(2, 6)
    half = [e for e in events if e["s"] < 600]
    with LiveView(c, 6, ["leonardo", "jupiter"], clock=FakeClock(step=1.0).now) as view:
        view.update(half)
        f = view.state.facilities["jupiter"]
    text = output(c)
    for word in ("leonardo", "jupiter", f.state, "held-out", "tokens/s", "rounds"):
        assert word in text
    assert f"{f.step}/{f.order_steps}" in text
    assert f"{f.held_out_curve[-1][2]:.3f}" in text
    assert ("jupiter-001" in text.split("rounds")[-2]) == (width >= 110)


def test_the_terminal_tells_when_an_allocation_starts_and_why_it_waits() -> None:
    """What a researcher looks for in a queue: forecast, reason, walltime left, successor."""
    c = console(terminal=True)
    clock = FakeClock()
    with LiveView(c, 4, ["leonardo", "lumi"], clock=clock.now) as view:
        for until in (20, 1640, 2450, 3000):
            clock.time += 1
            view.restore([e for e in job_events() if view.state.wall_s < e["s"] <= until])
            view.update()
    text = output(c)
    assert "starts in ~12 min (90 %: < 40 min) · Priority" in text
    assert "of walltime left, successor queued" in text
    assert "of walltime left, successor starting" in text


def test_a_forecast_counts_down_between_two_answers() -> None:
    """It is told when it changes, not every second."""
    f = fold_all(e for e in job_events() if e["s"] <= 20).facilities["leonardo"]
    assert outlook(f, 10.0) == "starts in ~12 min (90 %: < 40 min) · Priority"
    assert outlook(f, 10.0 + 600) == "starts in ~2 min (90 %: < 30 min) · Priority"
    assert outlook(f, 10_000.0) == "start is due · Priority"
    f.queue_wait_s = None
    assert outlook(f, 10.0) == "Priority"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_terminal_is_restored_on_any_way_out(error: type[BaseException]) -> None:
    """The cursor is shown again after Ctrl-C and after a crash."""
    c = console(terminal=True)

    def run() -> None:
        with LiveView(c, 6, ["a"]) as view:
            view.update(run_events(1, 2))
            raise error

    with pytest.raises(error):
        run()
    text = output(c)
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert text.rindex(SHOW) > text.rindex(HIDE)


def test_the_terminal_is_drawn_at_most_four_times_a_second() -> None:
    """A flood of events costs no flood of drawing."""
    c = console(terminal=True)
    clock = FakeClock()
    with LiveView(c, 6, ["a"], clock=clock.now) as view:
        before = len(output(c))
        for _ in range(100):
            view.update()
        assert len(output(c)) == before
        clock.time += 0.3
        view.update()
        assert len(output(c)) > before


def test_quantities_read_well() -> None:
    """Durations and counts keep two or three digits."""
    assert [duration(s) for s in (0.04, 9.97, 59.6, 3599.7, 7500, 90_000, 86_399)] == [
        "0.0 s", "10 s", "1 min 00 s", "1 h 00 min", "2 h 05 min", "1 d 01 h", "1 d 00 h",
    ]  # fmt: skip
    assert [compact(n) for n in (0, 12.34, 999.9, 12_345, 3.2e6, 1.5e9)] == [
        "0", "12.3", "1k", "12.3k", "3.2M", "1.5G",
    ]  # fmt: skip
    assert [about(s) for s in (40, 725, 3600 * 5.3, 86400 * 2.5)] == [
        "40 s", "12 min", "5 h 20 min", "2.5 d",
    ]  # fmt: skip
    assert [hours(h) for h in (0.004, 9.99, 10.04, 12_345)] == ["0.00", "9.99", "10.0", "12,345"]
    queued = {"event": "allocation", "facility": "a", "allocation": "x", "state": "queued",
              "queue_wait_s": 720.0, "reason": "Priority"}  # fmt: skip
    line = "a: allocation x waits in the queue, starts in ~12 min [Priority]"
    assert describe(queued) == line
    assert describe({"event": "unknown"}) is None
    assert describe({"event": "site_online", "facility": "a\nb"}) == "a b: site online"
