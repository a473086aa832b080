"""What became of an allocation: its worker's word and the scheduler's, brought together.

Kept beside the worker's files in the allocation's folder::

    ended.json   launcher: why the allocation is of no more use (`Verdict`), once
    times.json   launcher: the queue wait by the scheduler's own times
    gone         launcher: the scheduler said that the job has ended
    seen.json    launcher: the worker's last known beat, and when it was seen
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flwr_hpc.jobs.scheduler import JobInfo, Scheduler, SchedulerUnavailableError, stderr_tail
from flwr_hpc.jobs.waiting import Clock
from flwr_hpc.protocol import from_json
from flwr_hpc.spool import AllocationDir, WorkerState, publish, read_json

__all__ = ["Verdict", "View", "Watch", "verdict"]

PENDING_POLL_S = 1.0  # while a worker beats that the scheduler calls pending


@dataclass(frozen=True)
class Verdict:
    """Why an allocation ended.

    Attributes
    ----------
    why : str
        ``closed`` (the worker left on its own accord), ``failed`` (the worker says why, or
        the scheduler refused the job), ``died``, or ``cancelled`` by us.
    ready : bool
        Whether it ever had the model loaded.
    """

    why: Literal["closed", "failed", "died", "cancelled"]
    reason: str = ""
    fatal: bool = False
    ready: bool = False


@dataclass(frozen=True)
class View:
    """An allocation now."""

    state: Literal["queued", "starting", "ready", "ended"]
    worker: WorkerState | None = None


@dataclass
class _Seen:
    beat: int
    at: float  # on the monotonic clock; may lie before this process began
    moved: bool = False  # whether this process saw it move


def verdict(alloc: AllocationDir) -> Verdict | None:
    """Return how the allocation ended, or None while it has not."""
    raw = read_json(alloc.path / "ended.json")
    return from_json(Verdict, json.dumps(raw)) if raw is not None else None


class Watch:
    """Looks at allocations, and asks the scheduler no more often than it likes.

    Parameters
    ----------
    scheduler : Scheduler
    clock : Clock
    stale_s : float
        A worker whose beat stands still for so long, while its job runs, hangs.
    """

    def __init__(self, scheduler: Scheduler, clock: Clock, stale_s: float = 120.0) -> None:
        self.scheduler, self.clock, self.stale_s = scheduler, clock, stale_s
        self._began = clock.now()
        self._infos: dict[str, tuple[JobInfo, float]] = {}
        self._beats: dict[str, _Seen] = {}

    def look(self, alloc: AllocationDir, job: dict[str, Any]) -> View:
        """Return the state of a submitted allocation, and write down its end."""
        worker, info = alloc.state(), None
        if not _has_left(worker):
            # a worker that beats under a pending job: the last answer is out of date
            hurry = worker is not None and self._beat(alloc.path, worker).moved
            info = self._info(alloc, job, hurry)
            if info.state == "ended":
                (alloc.path / "gone").touch()
                worker = alloc.state()  # its last word may be younger than the first look
        if worker is not None and _has_left(worker):
            return self._left(alloc, job, worker)
        assert info is not None
        if info.state == "ended":
            reason = "\n".join(filter(None, (info.reason, stderr_tail(job))))
            return self.end(alloc, Verdict("died", reason, ready=_was_ready(worker)))
        if worker is None:
            return View("starting" if info.state == "running" else "queued")
        return self._living(alloc, job, info, worker)

    def end(self, alloc: AllocationDir, how: Verdict) -> View:
        """Write down that the allocation is of no more use."""
        job = alloc.job()
        queue_s = self._queue_s(alloc, job) if job else None
        if queue_s is not None:
            self._keep_queue(alloc, queue_s)
        publish(alloc.path / "ended.json", json.dumps(dataclasses.asdict(how)))
        return View("ended", alloc.state())

    def is_gone(self, alloc: AllocationDir, job: dict[str, Any]) -> bool:
        """Tell whether the scheduler says that the job has ended."""
        if not (alloc.path / "gone").exists() and self.scheduler.info(job).state == "ended":
            (alloc.path / "gone").touch()
        return (alloc.path / "gone").exists()

    def ledger(self, alloc: AllocationDir) -> dict[str, float]:
        """Return the seconds so far by what they went into."""
        job, worker = alloc.job(), alloc.state()
        queue = self._queue_s(alloc, job) if job else None
        return {"queue": queue or 0.0, **(worker.seconds if worker else {})}

    def _left(self, alloc: AllocationDir, job: dict[str, Any], worker: WorkerState) -> View:
        ready = _was_ready(worker)
        if worker.state == "closed":
            return self.end(alloc, Verdict("closed", ready=ready))
        self._cancel(job)  # other ranks may hang
        return self.end(alloc, Verdict("failed", worker.error, worker.fatal, ready))

    def _living(
        self, alloc: AllocationDir, job: dict[str, Any], info: JobInfo, worker: WorkerState
    ) -> View:
        seen = self._beat(alloc.path, worker)
        if info.state == "pending" and not seen.moved:  # requeued: the state is an old one
            return View("queued")
        if info.state == "running" and self._hangs(seen):
            self._cancel(job)
            reason = f"the worker gave no sign of life for {self.stale_s:.0f} s"
            reason = f"{reason}\n{stderr_tail(job)}".strip()
            return self.end(alloc, Verdict("died", reason, ready=_was_ready(worker)))
        ready = worker.state in ("ready", "running")
        return View("ready" if ready else "starting", worker)

    def _info(self, alloc: AllocationDir, job: dict[str, Any], hurry: bool) -> JobInfo:
        old, asked = self._infos.get(alloc.name, (None, 0.0))
        patience = self.scheduler.poll_s
        if hurry and old is not None and old.state == "pending":
            patience = min(patience, PENDING_POLL_S)
        if old is not None and self.clock.now() - asked < patience:
            return old
        new = self.scheduler.info(job)
        if new.state == "unknown" and old is not None:
            new = old  # no news
        self._infos[alloc.name] = new, self.clock.now()
        if new.queue_s is not None:
            self._keep_queue(alloc, new.queue_s)
        return new

    def _beat(self, folder: Path, worker: WorkerState) -> _Seen:
        seen = self._beats.get(folder.name)
        if seen is None:
            seen = self._beats[folder.name] = self._recall(folder, worker.beat)
        elif seen.beat != worker.beat:
            seen.beat, seen.at, seen.moved = worker.beat, self.clock.now(), True
        return seen

    def _recall(self, folder: Path, beat: int) -> _Seen:
        """Return what an earlier process saw; a message takes less time than a hang."""
        before = read_json(folder / "seen.json")
        if before is not None and before["beat"] == beat:
            age = max(0.0, self.clock.wall() - before["wall"])
            return _Seen(beat, self.clock.now() - age)
        publish(folder / "seen.json", json.dumps({"beat": beat, "wall": self.clock.wall()}))
        return _Seen(beat, self.clock.now(), moved=before is None)

    def _hangs(self, seen: _Seen) -> bool:
        # Look for a while ourselves: the wall clock may have jumped.
        now = self.clock.now()
        return now - seen.at > self.stale_s and now - self._began > min(10.0, self.stale_s)

    def _queue_s(self, alloc: AllocationDir, job: dict[str, Any]) -> float | None:
        times = read_json(alloc.path / "times.json")
        if times is not None:
            return float(times["queue_s"])
        info, _ = self._infos.get(alloc.name, (None, 0.0))
        if info is None or info.state != "pending":
            return None
        submitted: float = job["submitted_s"]
        return max(0.0, self.clock.wall() - submitted)

    def _keep_queue(self, alloc: AllocationDir, queue_s: float) -> None:
        if read_json(alloc.path / "times.json") != {"queue_s": queue_s}:
            publish(alloc.path / "times.json", json.dumps({"queue_s": queue_s}))

    def _cancel(self, job: dict[str, Any]) -> None:
        try:
            self.scheduler.cancel(job)
        except SchedulerUnavailableError:
            return  # not marked as gone: `Site.cancel_all` will find it


def _has_left(worker: WorkerState | None) -> bool:
    return worker is not None and worker.state in ("closed", "failed")


def _was_ready(worker: WorkerState | None) -> bool:
    if worker is None:
        return False
    worked = any(worker.seconds.get(key, 0.0) > 0 for key in ("train", "evaluate", "idle"))
    return worked or worker.state in ("ready", "running")
