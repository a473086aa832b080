"""When a site's jobs waited and ran, by the scheduler's own times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from flwr_hpc.schedulers.base import JobInfo
from flwr_hpc.spool import AllocationDir, JobTimes, QueueCycle

Span = tuple[float, float]  # Begin and end


def record_times(alloc: AllocationDir, info: JobInfo) -> None:
    """Write down what is new in the scheduler's word on a job that has started or ended."""
    old = alloc.times.read() or JobTimes(info.id)
    cycles = [c for c in old.cycles if c.started_s != info.started_s]
    requeued = bool(cycles) and (info.submitted_s or 0.0) > (cycles[-1].started_s or 0.0)
    ended_in_queue = info.state == "ended" and info.ended_s is not None and (requeued or not cycles)
    if info.state == "unknown" or not (info.started_s or old.cycles or ended_in_queue):
        return
    restarted = bool(cycles) and (info.started_s or 0.0) > (cycles[-1].started_s or 0.0)
    if (requeued or restarted) and cycles[-1].ended_s is None:  # as it began anew, at the latest
        cycles[-1] = replace(cycles[-1], ended_s=info.submitted_s if requeued else info.started_s)
    if info.started_s is not None or ended_in_queue:
        cycles.append(QueueCycle(info.submitted_s, info.eligible_s, info.started_s, info.ended_s))
    new = JobTimes(
        id=info.id,
        nodes=info.nodes or old.nodes,  # a lost job is not known to have any
        restarts=max(info.restarts, old.restarts),
        outcome=info.outcome,
        cycles=cycles,
    )
    if new != old:
        alloc.times.write(new)


def waits_and_runs(cycles: Sequence[QueueCycle], until: float) -> tuple[list[Span], list[Span]]:
    """Return when a job waited and when it ran; `until` ends what is not known to have ended."""
    waits, runs = [], []
    for cycle in cycles:
        if cycle.started_s is not None:
            runs.append((cycle.started_s, until if cycle.ended_s is None else cycle.ended_s))
        if cycle.submitted_s is not None:
            end = cycle.ended_s if cycle.started_s is None else cycle.started_s
            waits.append((cycle.submitted_s, until if end is None else end))
    return waits, runs


def total_s(spans: Iterable[Span]) -> float:
    """Return the spans' lengths, added up."""
    return float(sum(max(0.0, end - begin) for begin, end in spans))


def waiting_s(waits: Iterable[Span], runs: Iterable[Span]) -> float:
    """Return for how long some job waited while none ran, each moment counted once."""
    runs = list(runs)
    return _union_s([*waits, *runs]) - _union_s(runs)


def _union_s(spans: Iterable[Span]) -> float:
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
