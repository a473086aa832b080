"""The event log loses and invents nothing, whatever happens to its writers."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from worlds.clock import FakeClock

from flwr_hpc.tracking.events import EventLog, follow, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events.jsonl"


def test_events_are_read_as_written(path: Path) -> None:
    """What is emitted comes back, in order, with both times."""
    clock = FakeClock(1000.0)
    with EventLog(path, clock.now, wall=lambda: 50.0) as log:
        clock.time = 1002.5
        log.emit("order_sent", facility="a", steps=3)
        returned = log.emit("order_done", facility="a")
    assert read(path) == [
        {"t": 50.0, "s": 2.5, "event": "order_sent", "facility": "a", "steps": 3},
        returned,
    ]


def test_numbers_become_strict_json(path: Path) -> None:
    """No NaN reaches the file, and numpy's scalars are numbers."""
    with EventLog(path) as log:
        log.emit("x", a=float("nan"), b=[np.float32(0.5), np.inf], c={1: np.int64(7)}, d=Path("/p"))
    (line,) = path.read_text().splitlines()
    event = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert [event[k] for k in "abcd"] == [None, [0.5, None], {"1": 7}, "/p"]


def test_fields_cannot_replace_the_time(path: Path) -> None:
    """`s` stays monotonic even if a caller has a field of that name."""
    with EventLog(path, FakeClock(3.0).now) as log:
        assert log.emit("x", s=-1.0)["s"] == 0.0


def test_a_resumed_log_continues_the_time_without_the_pause(path: Path) -> None:
    """`s` goes on where the last session stopped, so curves continue."""
    clock, wall = FakeClock(10.0), FakeClock(0.0)
    with EventLog(path, clock.now, wall=wall.now) as log:
        clock.time = 15.0
        log.emit("x")
    wall.time = 86_400.0
    clock.time = 3.0  # another boot
    with EventLog(path, clock.now, wall=wall.now) as log:
        clock.time = 4.0
        log.emit("y")
    assert [e["s"] for e in read(path)] == [5.0, 6.0]


def test_a_second_writer_of_a_session_joins_its_time(path: Path) -> None:
    """With `join`, the time since the last event counts."""
    wall = FakeClock(100.0)
    with EventLog(path, FakeClock().now, wall=wall.now) as log:
        log.emit("x")
        wall.time = 107.0
        with EventLog(path, FakeClock(55.0).now, wall=wall.now, join=True) as other:
            assert other.emit("y")["s"] == 7.0


def test_a_torn_last_line_is_skipped_and_left_behind(path: Path) -> None:
    """kill -9 in the middle of a write costs that event alone."""
    with EventLog(path) as log:
        log.emit("one")
    with open(path, "ab") as f:
        f.write(b'{"t": 1, "s": 9, "ev')
    assert [e["event"] for e in read(path)] == ["one"]
    with EventLog(path) as log:
        log.emit("two")
    assert [e["event"] for e in read(path)] == ["one", "two"]


@pytest.mark.parametrize("junk", [b"\x00\x00\x00\x00", b"\xff\xfe", b"[1]", b'{"s": 1}', b"7", b""])
def test_foreign_lines_are_skipped(path: Path, junk: bytes) -> None:
    """Whatever else stands in the file, the events around it are read."""
    with EventLog(path) as log:
        log.emit("one")
    with open(path, "ab") as f:
        f.write(junk + b"\n")
    with EventLog(path) as log:
        log.emit("two")
    assert [e["event"] for e in read(path)] == ["one", "two"]


def test_follower_returns_new_complete_events_once(path: Path) -> None:
    """A half-written line is returned when it is whole, and nothing twice."""
    tail = follow(path)
    assert tail.poll() == []  # no file yet
    with EventLog(path) as log:
        log.emit("one")
        assert [e["event"] for e in tail.poll()] == ["one"]
        with open(path, "ab") as f:
            f.write(b'{"event": "tw')
            f.flush()
            assert tail.poll() == []
            f.write(b'o"}\n')
    assert [e["event"] for e in tail.poll()] == ["two"]
    assert tail.poll() == []


def test_threads_do_not_mix_lines(path: Path) -> None:
    """Every event of every thread is one whole line, in the order of its time."""
    with EventLog(path) as log:
        threads = [
            threading.Thread(target=lambda i=i: [log.emit("x", i=i, k=k) for k in range(100)])
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = read(path)
    assert len(events) == 800
    assert len(path.read_bytes().splitlines()) == 800
    assert [e["s"] for e in events] == sorted(e["s"] for e in events)


def test_a_failed_write_does_not_end_the_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk costs events, not the training; the next line stands on its own."""
    log = EventLog(path)
    log.emit("one")
    with monkeypatch.context() as m:
        m.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        log.emit("lost")
    log.emit("two")
    log.close()
    log.close()
    assert [e["event"] for e in read(path)] == ["one", "two"]
    assert "No space left" in caplog.text
