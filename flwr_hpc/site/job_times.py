"""When a job waited and ran, by the scheduler's own times.

Kept in ``times.json`` in the allocation's folder; a job that was put back in the queue has a
stay for every start, and one without a start if it ended in the queue.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from flwr_hpc.files import publish, read_json
from flwr_hpc.schedulers.base import JobInfo
from flwr_hpc.spool import AllocationDir

Span = tuple[float, float]  # Begin and end
STAY = ("submitted_s", "eligible_s", "started_s", "ended_s")


def times(alloc: AllocationDir) -> dict[str, Any]:
    """Return what was kept: ``id``, ``nodes``, ``restarts``, ``outcome``, ``stays``."""
    return read_json(alloc.path / "times.json") or {}


def keep_times(alloc: AllocationDir, info: JobInfo) -> None:
    """Write down what is new in the scheduler's word on a job that has started or ended."""
    old = times(alloc)
    known = old.get("stays", [])
    stays = [s for s in known if s["started_s"] != info.started_s]
    back = bool(stays) and (info.submitted_s or 0.0) > (stays[-1]["started_s"] or 0.0)
    in_vain = info.state == "ended" and info.ended_s is not None and (back or not stays)
    if info.state == "unknown" or not (info.started_s or known or in_vain):
        return
    if back and stays[-1]["ended_s"] is None:
        stays[-1] = stays[-1] | {"ended_s": info.submitted_s}  # put back in the queue then
    if info.started_s is not None or in_vain:
        stays.append({name: getattr(info, name) for name in STAY})
    new = {
        "id": info.id,
        "nodes": info.nodes or old.get("nodes"),  # a lost job is not known to have any
        "restarts": max(info.restarts, old.get("restarts", 0)),
        "outcome": info.outcome,
        "stays": stays,
    }
    if new != old:
        publish(alloc.path / "times.json", json.dumps(new))


def queue_s(kept: dict[str, Any]) -> float:
    """Return the seconds a job waited, over all its stays."""
    waits = [
        (s["ended_s"] if s["started_s"] is None else s["started_s"]) - s["submitted_s"]
        for s in kept.get("stays", [])
        if s["submitted_s"] is not None
    ]
    return float(sum(max(0.0, wait) for wait in waits))


def spans(kept: dict[str, Any], until: float) -> tuple[list[Span], list[Span]]:
    """Return when a job waited and when it ran; `until` ends what is not known to have ended."""
    waits, runs = [], []
    for stay in kept.get("stays", []):
        submitted, started, ended = stay["submitted_s"], stay["started_s"], stay["ended_s"]
        if started is not None:
            runs.append((started, until if ended is None else ended))
        if submitted is not None:
            waits.append((submitted, ended if started is None else started))
    return waits, runs


def alone_s(waits: Iterable[Span], runs: Iterable[Span]) -> float:
    """Return for how long somebody waited while nobody ran, each moment counted once."""
    runs = list(runs)
    return _covered([*waits, *runs]) - _covered(runs)


def _covered(spans: Iterable[Span]) -> float:
    """Return the length of the spans' union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
