"""Which allocation did what when: lanes of a facility's timeline, one for each that lived.

The scheduler's times say when a job waited and ran, on the clock of its facility; they are
placed on the run's time by what must be so: nothing is told before it has happened. Start-up
and load are durations of the worker, and orders lie where the server saw them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence

from flwr_hpc.tracking.jobs import Job
from flwr_hpc.tracking.records import FacilityState, RunState
from flwr_hpc.tracking.timeline import Interval

Span = tuple[float, float, str, str]  # start and end in seconds of the run, phase, allocation
Lane = list[Span]

WORK = ("train", "evaluate", "transfer")
# News come late by a long poll; two clocks that differ by no more than that count as equal.
LATE_S = 300.0


def lanes(state: RunState, f: FacilityState, until_s: float) -> list[Lane]:
    """Return the lanes of a facility; allocations that live at the same time lie in several.

    Without times of the scheduler there is one lane, the facility's timeline.
    """
    place = _clock(state, f)
    timed = [job for job in f.accounts.jobs.values() if job.cycles]
    if place is None or not timed:
        return [[(start, end, phase, "") for start, end, phase in f.intervals(until_s)]]
    holds = _holds(f, until_s)
    work = f.intervals(until_s)
    bars = []
    for job in timed:
        windows = [(since, until) for name, since, until in holds if name == job.name]
        gone = bool(windows) and job.name != f.allocation
        bars.append(_allocation(job, place, windows, work, windows[-1][1] if gone else until_s))
    names = {job.name for job in timed}
    for name, since, until in holds:  # allocations of which no scheduler told
        if name not in names:
            bars.append([(*part, name) for part in _clip(work, since, until)])
    bars = sorted((bar for bar in bars if bar), key=lambda bar: bar[0][0])
    if bars and f.accounts.past.jobs:  # too many to show each
        bars.insert(0, [(*part, "") for part in _clip(work, 0.0, bars[0][0][0])])
    return _stack(bar for bar in bars if bar)


def _clock(state: RunState, f: FacilityState) -> Callable[[float], float] | None:
    """Return what turns the facility's Unix seconds into seconds of the run."""
    if f.skew_s is None or not state.clocks:
        return None
    skew = 0.0 if 0 <= f.skew_s <= LATE_S else f.skew_s
    begins = [t for t, _ in state.clocks]

    def place(unix_s: float) -> float:
        t = unix_s + skew
        i = max(0, bisect.bisect_right(begins, t) - 1)
        s = state.clocks[i][1] + t - begins[i]
        # The pause between two sessions is no time of the run.
        after = state.clocks[i + 1][1] if i + 1 < len(begins) else s
        return max(0.0, min(s, after))

    return place


def _holds(f: FacilityState, until_s: float) -> list[tuple[str, float, float]]:
    """Return allocation, begin and end of the times in which one worked for the facility."""
    last = until_s if f.hold_from_s is None else f.hold_from_s
    ends = [*(since for since, _ in f.holds[1:]), last]
    pairs = zip(f.holds, ends, strict=False)  # without a hold there is one end too many
    return [(name, since, end) for (since, name), end in pairs]


def _allocation(
    job: Job,
    place: Callable[[float], float],
    windows: Sequence[tuple[float, float]],
    work: Sequence[Interval],
    until_s: float,
) -> Lane:
    """Return what one allocation did, cycle by cycle; it worked for its facility in `windows`."""
    found: list[Interval] = []
    at = 0.0
    for i, cycle in enumerate(job.cycles):
        over = cycle.ended_s
        if over is None and i + 1 < len(job.cycles):
            over = job.cycles[i + 1].submitted_s
        end = until_s if over is None else min(until_s, place(over))
        start = end if cycle.started_s is None else min(end, place(cycle.started_s))
        at = max(at, start if cycle.submitted_s is None else min(start, place(cycle.submitted_s)))
        found.append((at, start, "queue"))
        clips = [_clip(work, max(start, since), min(end, to)) for since, to in windows]
        pieces = [part for clip in clips for part in clip if part[2] in WORK]
        found += _run(start, end, job.worker(i), pieces)
        at = end
    if job.requeued:
        found.append((at, until_s, "queue"))
    return [(start, end, phase, job.name) for start, end, phase in found if end > start]


def _run(
    start: float, end: float, worker: dict[str, float], pieces: Sequence[Interval]
) -> list[Interval]:
    """Return a job's time from start to end: what it did, else start-up, load, then idle."""
    loading = min(end, start + worker.get("startup", 0.0))
    ready = min(end, loading + worker.get("load", 0.0))
    base = [(start, loading, "startup"), (loading, ready, "load"), (ready, end, "idle")]
    found: list[Interval] = []
    at = start
    for piece in [*pieces, (end, end, "idle")]:
        found += _clip(base, at, piece[0])
        found.append(piece)
        at = max(at, piece[1])
    return [part for part in found if part[1] > part[0]]


def _clip(intervals: Sequence[Interval], start: float, end: float) -> list[Interval]:
    """Return what lies between two moments."""
    first = bisect.bisect_right(intervals, start, key=lambda part: part[1])
    found = []
    for since, until, phase in intervals[first:]:
        if since >= end:
            break
        found.append((max(since, start), min(until, end), phase))
    return found


def _stack(bars: Iterable[Lane]) -> list[Lane]:
    """Put each allocation into the first lane that is free again."""
    stacked: list[Lane] = []
    for bar in bars:
        free = next((lane for lane in stacked if lane[-1][1] <= bar[0][0]), None)
        if free is None:
            stacked.append(list(bar))
        else:
            free += bar
    return stacked
