"""The probe job of one facility: submitted, watched, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr_hpc.clock import Clock
from flwr_hpc.config.facility import FacilityConfig, queue_of, walltime_s
from flwr_hpc.doctor import probe
from flwr_hpc.doctor.login import duration, refusal
from flwr_hpc.errors import UserError
from flwr_hpc.files import publish, read_json
from flwr_hpc.schedulers.base import (
    JobInfo,
    JobSpec,
    Scheduler,
    SchedulerUnavailableError,
    checkout,
    stderr_tail,
)

WALLTIME_S, MEASURING_WALLTIME_S = 600, 1200
AFTER_END_S = 30.0  # for the last files of a job that has ended, with nothing seen of it
AFTER_START_S = probe.PING_S + probe.LOOK_S + 60.0  # the last rank may start that much later
FIRST_LOOK_S = 5.0


@dataclass
class ProbeResult:
    """What the probe job brought back, as far as it came."""

    facility: FacilityConfig  # As the job had it
    job_id: str = ""
    fault: str = ""  # Why it did not come to its end; empty if it did
    # What each rank found, see `flwr_hpc.doctor.probe`.
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    waited_s: float | None = None  # From submission until the first sign of life
    # Until a file for a rank was seen there and its answer seen here.
    round_trip_s: dict[int, float] = field(default_factory=dict)
    # The rank's clock minus this host's lies in between.
    clock_s: dict[int, tuple[float, float]] = field(default_factory=dict)
    log: str = ""  # The end of what the ranks wrote to stderr
    token: str = ""  # What a rank reads in a file that was written here
    date: str = ""  # When it was submitted, ISO 8601, UTC


def probe_facility(f: FacilityConfig, nodes: int, bandwidth: bool = False) -> FacilityConfig:
    """Return the facility as the probe asks for it: few nodes, few minutes."""
    queue = queue_of(f)
    least = queue.min_nodes if queue else 1
    longest = MEASURING_WALLTIME_S if bandwidth else WALLTIME_S
    short = walltime_s(f.walltime) > longest
    return replace(
        f,
        nodes=max(least, min(f.nodes, nodes)),
        walltime=f"00:{longest // 60}:00" if short else f.walltime,
    )


class Probe:
    """One probe job; `start`, `poll` until it says so, and `close` on every way out.

    Parameters
    ----------
    name : str
        Of the facility.
    facility : FacilityConfig
        As the job is to have it, see `probe_facility`.
    root : Path
        A folder for this probe alone, on the shared file system; made and removed.
    scheduler : Scheduler
    clock : Clock
    queue_s : float
        How long it may wait in the queue.
    urls : tuple of str
        What compute nodes shall reach.
    bandwidth : bool
        Whether the ranks also measure collectives.
    """

    def __init__(
        self,
        name: str,
        facility: FacilityConfig,
        root: Path,
        scheduler: Scheduler,
        clock: Clock,
        queue_s: float,
        urls: tuple[str, ...] = (),
        bandwidth: bool = False,
    ) -> None:
        self.name, self.folder = name, root / "probe"
        self.result = ProbeResult(facility, token=secrets.token_hex(8))
        self.spec = JobSpec(
            name=f"doctor-{self.result.token[:6]}-{name}",
            folder=root / "job",
            facility=facility,
            function=probe.run,
            args=(str(self.folder),),
            binds=tuple(filter(None, (str(root), checkout()))),
        )
        self._root, self._scheduler, self._clock = root, scheduler, clock
        self._queue_s, self._urls, self._bandwidth = queue_s, urls, bandwidth
        self._made = next(p for p in (root, *root.parents) if p.parent.exists())
        self.left = ""  # what could not be ended
        self._job: dict[str, Any] | None = None
        self._info: JobInfo | None = None
        self._submitted = self._asked = self._ended = float("inf")
        self._greeted: dict[int, tuple[float, float]] = {}  # when, the rank's clock ahead by

    @property
    def state(self) -> str:
        """What to show while waiting."""
        said = self._info.reason or self._info.state if self._info else "submitted"
        seen = f", {len(self._greeted)} ranks at work" if self._greeted else ""
        return f"{self.name}: probe job {self.result.job_id} {said}{seen}"

    def start(self) -> None:
        """Submit the job; a refusal is part of what was found."""
        asked = {"token": self.result.token, "urls": self._urls, "bandwidth": self._bandwidth}
        self._submitted = self._clock.now()
        now = datetime.fromtimestamp(self._clock.wall(), UTC)
        self.result.date = now.isoformat(timespec="seconds")
        try:
            publish(self.folder / "ask.json", json.dumps(asked))
            self._job = self._scheduler.submit(self.spec)
        except UserError as exc:
            self.result.fault = refusal(exc)
            return
        except (SchedulerUnavailableError, OSError) as exc:
            self.result.fault = str(exc)
            return
        self.result.job_id = self._job["id"]
        soon = min(FIRST_LOOK_S, self._scheduler.poll_s)
        self._asked = self._clock.now() + soon - self._scheduler.poll_s

    def poll(self) -> bool:
        """Look at the files, and at times at the queue; True when there is no more to wait for."""
        if self._job is None:
            return True
        self._read_files()
        world = self.spec.facility.nodes * self.spec.facility.ranks_per_node
        if len(self.result.reports) == world:
            return True
        now = self._clock.now()
        if now - self._asked >= self._scheduler.poll_s:
            self._asked = now
            self._ask_scheduler(self._job)
        self.result.fault = self._fault(now)
        return bool(self.result.fault)

    def close(self) -> None:
        """End the job and remove its files; to be called again is harmless."""
        try:
            self._end_job()
            self.left = ""
        except SchedulerUnavailableError as exc:
            self.left = f"job '{self.spec.name}' may still be queued or run: {exc}"
        for _ in range(5):  # the job's last words may come in between
            shutil.rmtree(self._root, ignore_errors=True)
            if not self._root.exists():
                break
            self._clock.sleep(0.5)
        for folder in self._root.parents:
            if not folder.is_relative_to(self._made):
                break
            with contextlib.suppress(OSError):  # somebody else uses it by now
                folder.rmdir()

    def _end_job(self) -> None:
        job = self._job
        if job is None and self._submitted < float("inf"):
            job = self._scheduler.find(self.spec)  # interrupted while submitting
        if job is not None:
            self.result.job_id = job["id"]
            self.result.log = self.result.log or _log(job)
            self._scheduler.cancel(job)

    def _ask_scheduler(self, job: dict[str, Any]) -> None:
        info = self._scheduler.infos([job])[job["name"]]
        if info.state != "unknown" or self._info is None:
            self._info = info
        if self._info.state == "ended":
            self._ended = min(self._ended, self._clock.now())
            self.result.log = _log(job)

    def _fault(self, now: float) -> str:
        """Return why not to wait any longer, or nothing."""
        info, waited = self._info, now - self._submitted
        if info is not None and info.stuck:
            return f"the job will not start: {info.reason}"
        if now - self._ended > self._grace_s():
            return f"the job ended early: {info.reason if info else ''}"
        started = self.result.waited_s
        if started is None and waited > self._queue_s:
            said = info.reason or info.state if info else "no answer"
            return f"no sign of life after {duration(waited)}; the scheduler says: {said}"
        longest = AFTER_START_S + (probe.MEASURE_S if self._bandwidth else 0.0)
        if started is not None and waited - started > longest:
            return f"some ranks did not come to an end in {duration(longest)}"
        return ""

    def _grace_s(self) -> float:
        """Return how long to wait for the files of a job that has ended."""
        if self.spec.facility.local:
            return 1.0
        return FIRST_LOOK_S if self.result.log else AFTER_END_S

    def _read_files(self) -> None:
        """See who said hello, send them a file, and take the answers."""
        names = set(os.listdir(self.folder))
        world = self.spec.facility.nodes * self.spec.facility.ranks_per_node
        for rank in range(world):
            if rank not in self._greeted and f"hello-{rank}.json" in names:
                self._greet(rank)
            if rank not in self.result.round_trip_s and f"pong-{rank}.json" in names:
                self._take(rank)
            if rank not in self.result.reports and f"report-{rank}.json" in names:
                self.result.reports[rank] = read_json(self.folder / f"report-{rank}.json") or {}

    def _greet(self, rank: int) -> None:
        said = read_json(self.folder / f"hello-{rank}.json")
        if said is None:
            return
        if self.result.waited_s is None:
            self.result.waited_s = self._clock.now() - self._submitted
        least = said["wall"] - self._clock.wall()  # it was written before it was seen
        sent = self._clock.wall()
        publish(self.folder / f"ping-{rank}.json", "{}")
        self._greeted[rank] = (sent, least)

    def _take(self, rank: int) -> None:
        said = read_json(self.folder / f"pong-{rank}.json")
        if said is None or rank not in self._greeted:
            return
        sent, least = self._greeted[rank]
        now = self._clock.wall()
        self.result.round_trip_s[rank] = now - sent
        self.result.clock_s[rank] = (max(least, said["wall"] - now), said["wall"] - sent)


def _log(job: dict[str, Any]) -> str:
    try:
        return stderr_tail(job)
    except OSError:  # it is being written or removed
        return ""
