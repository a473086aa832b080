"""Whether a worker is alive, or its last heartbeat is left over from before a requeue."""

from __future__ import annotations

from dataclasses import replace

from flwr_hpc.clock import Clock
from flwr_hpc.schedulers.base import JobInfo
from flwr_hpc.spool import AllocationDir, Heartbeat, WorkerState

SILENCE_S = 15.0  # of a worker whose job the scheduler calls pending, until that is believed


class HeartbeatMonitor:
    """Remembers the beats of a site's workers, in files what earlier processes saw.

    Parameters
    ----------
    clock : Clock
    stale_s : float
        A worker whose beat stands still for so long hangs.
    """

    def __init__(self, clock: Clock, stale_s: float) -> None:
        self.stale_s = stale_s
        self._clock, self._began = clock, clock.now()
        self._last: dict[str, Heartbeat] = {}
        self._seen_at: dict[str, float] = {}  # on the monotonic clock; may lie before this process
        self._moved: set[str] = set()  # those this process saw move, or saw first

    def is_outdated(self, alloc: AllocationDir, worker: WorkerState, info: JobInfo) -> bool:
        """Tell whether the worker's word is older than its job's present queue cycle or start."""
        last = self._observe(alloc, worker, info)
        if not last.outdated and (
            self._is_back_in_queue(alloc.name, info) or info.restarts > last.restarts
        ):
            last = self._last[alloc.name] = replace(last, outdated=True)
            alloc.heartbeat.write(last)
        return last.outdated

    def has_stopped(self, alloc: AllocationDir) -> bool:
        """Tell whether the beat has stood still for too long; ask `is_outdated` before."""
        # Look for a while ourselves: the wall clock may have jumped.
        now = self._clock.now()
        silent = now - self._seen_at[alloc.name]
        return silent > self.stale_s and now - self._began > min(10.0, self.stale_s)

    def _is_back_in_queue(self, name: str, info: JobInfo) -> bool:
        if info.state != "pending":
            return False
        silent = self._clock.now() - self._seen_at[name]
        return name not in self._moved or silent > SILENCE_S

    def _observe(self, alloc: AllocationDir, worker: WorkerState, info: JobInfo) -> Heartbeat:
        last = self._last.get(alloc.name)
        if last is None:
            return self._recall(alloc, worker.beat, info)
        if last.beat != worker.beat:
            return self._note(alloc, worker.beat, info)
        return last

    def _note(self, alloc: AllocationDir, beat: int, info: JobInfo) -> Heartbeat:
        """Remember a beat that this process saw come."""
        name, before = alloc.name, self._last.get(alloc.name)
        new = Heartbeat(beat, self._clock.wall(), info.restarts)
        self._last[name], self._seen_at[name] = new, self._clock.now()
        self._moved.add(name)
        if before is None or before.outdated:
            alloc.heartbeat.write(new)
        return new

    def _recall(self, alloc: AllocationDir, beat: int, info: JobInfo) -> Heartbeat:
        """Return what an earlier process saw; a message takes less time than a hang."""
        last = alloc.heartbeat.read()
        if last is None:
            return self._note(alloc, beat, info)
        if last.beat != beat:
            last = Heartbeat(beat, self._clock.wall(), last.restarts)
            alloc.heartbeat.write(last)
        self._last[alloc.name] = last
        age = max(0.0, self._clock.wall() - last.first_seen_s)
        self._seen_at[alloc.name] = self._clock.now() - age
        return last
