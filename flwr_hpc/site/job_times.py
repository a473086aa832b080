"""When a job waited and ran, by the scheduler's own times.

Kept in ``times.json`` in the allocation's folder; a job that was put back in the queue has a
stay for every start, and one without a start if it ended in the queue.
"""

from __future__ import annotations

import json
from typing import Any

from flwr_hpc.files import publish, read_json
from flwr_hpc.schedulers.base import JobInfo
from flwr_hpc.spool import AllocationDir

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
