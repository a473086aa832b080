"""The event log: one JSON object per line, appended, never rewritten. Standard library only.

Every event has ``t`` (unix seconds), ``s`` (seconds of the run so far, on the server's
monotonic clock) and ``event`` (its name). ``s`` counts the time in which somebody ran the run:
a resumed session continues from the last event's ``s``, so curves go on where they stopped and
the pause between two sessions is left out (``t`` still tells it).
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]

FILE_NAME = "events.jsonl"

# Events that a report must not miss even if the machine goes down the next moment.
DURABLE = frozenset(
    {
        *("run_started", "order_done", "order_rejected", "order_failed", "site_excluded"),
        *("aggregated", "run_finished"),
    }
)
TAIL_BYTES = 1 << 20  # where the last complete event is looked for

logger = logging.getLogger(__name__)


class EventLog:
    """Append events to a file; safe for the threads of one process.

    Each event is one ``write`` in append mode, so processes that share the file do not mix
    their lines. A write that fails (quota, stale handle) is reported in the log and the run
    goes on: no training result depends on this file.

    Parameters
    ----------
    path : Path
        Created with its folder; an existing log is continued.
    clock, wall : callable
        Monotonic and unix seconds.
    join : bool
        The log is being written by another process of this same session: count the time
        since its last event instead of leaving it out.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        *,
        wall: Callable[[], float] = time.time,
        join: bool = False,
    ) -> None:
        self.path = Path(path)
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tail = _tail(self.path)
        self._torn = bool(tail) and not tail.endswith(b"\n")
        last = next((e for e in reversed(_events(tail)) if _is_number(e.get("s"))), None)
        start = float(last["s"]) if last else 0.0
        if last and join and _is_number(last.get("t")):
            start += max(0.0, wall() - float(last["t"]))
        self._offset = start - clock()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def seconds(self) -> float:
        """Seconds of the run so far."""
        return self._clock() + self._offset

    def emit(self, event: str, **fields: Any) -> Event:
        """Append one event and return it as written; non-finite numbers become null."""
        rest = _clean(fields)
        with self._lock:  # lines stand in the order of their `s`
            now = {"t": round(self._wall(), 3), "s": round(self.seconds(), 3)}
            record: Event = {**now, "event": event, **rest, **now}
            line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
            self._append(line, durable=event in DURABLE)
        return record

    def _append(self, line: bytes, *, durable: bool) -> None:
        data = b"\n" + line if self._torn else line  # leave a torn line behind, on its own
        try:
            written = os.write(self._fd, data)
            self._torn = written < len(data)
            if durable:
                os.fsync(self._fd)
        except OSError as exc:
            self._torn = True
            logger.warning("cannot write an event to %s: %s", self.path, exc)
        else:
            if self._torn:
                logger.warning("wrote only part of an event to %s: is the disk full?", self.path)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Follower:
    """Read a growing log bit by bit."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._offset = 0

    def poll(self) -> list[Event]:
        """Return the complete events since the last call, at once; none if there is no file."""
        try:
            with open(self.path, "rb") as f:
                f.seek(self._offset)
                data = f.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return _events(complete)


def follow(path: Path) -> Follower:
    """Return a reader whose ``poll()`` gives the events that came since the last call."""
    return Follower(path)


def read(path: Path) -> list[Event]:
    """Return all complete events; torn or foreign lines are skipped.

    Raises
    ------
    FileNotFoundError
        If there is no log.
    """
    return _events(Path(path).read_bytes())


def _events(data: bytes) -> list[Event]:
    found = (_event(line) for line in data.split(b"\n"))
    return [e for e in found if e is not None]


def _event(line: bytes) -> Event | None:
    """Return the event of a line, or None if a crash tore it or something else wrote it."""
    try:
        value = json.loads(line)
    except ValueError:  # also invalid UTF-8
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def _tail(path: Path) -> bytes:
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return f.read()
    except FileNotFoundError:
        return b""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _clean(value: Any) -> Any:
    """Return `value` made of strict JSON types."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(v) for v in value]
    if hasattr(value, "tolist"):  # numpy
        return _clean(value.tolist())
    return str(value)
