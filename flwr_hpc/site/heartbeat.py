"""Whether a worker's last word is a sign of life, or left over from before its job was requeued.

``seen.json`` in the allocation's folder keeps what earlier processes saw.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr_hpc.clock import Clock
from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import from_json
from flwr_hpc.schedulers.base import JobInfo
from flwr_hpc.spool import WorkerState

SILENCE_S = 15.0  # of a worker whose job the scheduler calls pending, until that is believed


@dataclass
class _Seen:
    """A beat; `wall`: when it was first seen; `restarts`: of its job at that time.

    `former`: it is from before the job's present start.
    """

    beat: int
    wall: float
    restarts: int = 0
    former: bool = False


class Heartbeat:
    """Remembers the beats of a site's workers.

    Parameters
    ----------
    clock : Clock
    stale_s : float
        A worker whose beat stands still for so long hangs.
    """

    def __init__(self, clock: Clock, stale_s: float) -> None:
        self.stale_s = stale_s
        self._clock, self._began = clock, clock.now()
        self._kept: dict[str, _Seen] = {}
        self._at: dict[str, float] = {}  # on the monotonic clock; may lie before this process
        self._moved: set[str] = set()  # those this process saw move, or saw first

    def former(self, folder: Path, worker: WorkerState, info: JobInfo) -> bool:
        """Tell whether the worker's word is older than its job's present stay or start."""
        seen = self._look(folder, worker, info)
        if not seen.former and (self._back_in_queue(folder, info) or info.restarts > seen.restarts):
            seen.former = True
            self._write(folder, seen)
        return seen.former

    def stopped(self, folder: Path, worker: WorkerState) -> bool:
        """Tell whether the beat has stood still for too long; ask `former` before."""
        # Look for a while ourselves: the wall clock may have jumped.
        now = self._clock.now()
        silent = now - self._at[folder.name]
        return silent > self.stale_s and now - self._began > min(10.0, self.stale_s)

    def _back_in_queue(self, folder: Path, info: JobInfo) -> bool:
        if info.state != "pending":
            return False
        silent = self._clock.now() - self._at[folder.name]
        return folder.name not in self._moved or silent > SILENCE_S

    def _look(self, folder: Path, worker: WorkerState, info: JobInfo) -> _Seen:
        name = folder.name
        seen = self._kept.get(name)
        if seen is None:
            seen = self._recall(folder, worker.beat, info)
        elif seen.beat != worker.beat:
            seen = self._note(folder, worker.beat, info)
        return seen

    def _note(self, folder: Path, beat: int, info: JobInfo) -> _Seen:
        """Remember a beat that this process saw come."""
        before = self._kept.get(folder.name)
        seen = _Seen(beat, self._clock.wall(), info.restarts)
        self._kept[folder.name], self._at[folder.name] = seen, self._clock.now()
        self._moved.add(folder.name)
        if before is None or before.former:
            self._write(folder, seen)
        return seen

    def _recall(self, folder: Path, beat: int, info: JobInfo) -> _Seen:
        """Return what an earlier process saw; a message takes less time than a hang."""
        raw = read_json(folder / "seen.json")
        if raw is None:
            return self._note(folder, beat, info)
        seen = from_json(_Seen, json.dumps(raw))
        if seen.beat != beat:
            seen = _Seen(beat, self._clock.wall(), seen.restarts)
            self._write(folder, seen)
        self._kept[folder.name] = seen
        age = max(0.0, self._clock.wall() - seen.wall)
        self._at[folder.name] = self._clock.now() - age
        return seen

    def _write(self, folder: Path, seen: _Seen) -> None:
        publish(folder / "seen.json", json.dumps(asdict(seen)))
