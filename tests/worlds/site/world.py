"""One site on a scheduler, a forecast and a clock made for the test; no processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worlds.clock import FakeClock

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import AllocationConfig, LimitsConfig
from flwr_hpc.protocol import Order, Result
from flwr_hpc.schedulers.base import JobInfo, JobSpec, SchedulerUnavailableError
from flwr_hpc.site.forecast.base import NoForecast
from flwr_hpc.site.manager import AllocationManager
from flwr_hpc.spool import CHECKPOINT_META, AllocationDir, Spool, WorkerState, checkpoint_name

HOUR = 3600.0


class Killed(BaseException):
    """Stands for kill -9 of the launcher."""


class Scheduler:
    poll_s = 30.0

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.jobs: dict[str, dict[str, Any]] = {}
        self.states: dict[str, str] = {}
        self.words: dict[str, dict[str, Any]] = {}  # what else it says of a job
        self.cancelled: list[str] = []
        self.late: dict[str, list[str]] = {}  # ids of further living jobs, by name
        self.looked: list[str] = []  # names that such jobs were looked for under
        self.asked = 0
        self.trouble: BaseException | None = None  # after the job is submitted, or cancelled
        self.refusal: BaseException | None = None  # instead of submitting it
        self.away: BaseException | None = None  # instead of finding it

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        assert spec.name not in self.jobs, "submitted twice"
        if self.refusal:
            raise self.refusal
        self.accept(spec.name, str(spec.folder))
        if self.trouble:
            raise self.trouble
        return self.jobs[spec.name]

    def accept(self, name: str, folder: str = "/jobs") -> None:
        """Take a job, whoever waits for the answer."""
        job = {"id": str(len(self.jobs) + 1), "name": name, "folder": folder}
        self.jobs[name] = {**job, "submitted_s": self.clock.wall()}
        self.states.setdefault(name, "pending")

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        if self.away:
            raise self.away
        return self.jobs.get(spec.name)

    def cancel_named(self, name: str, but: str = "") -> None:
        if self.away:
            raise self.away
        self.looked.append(name)
        found = [*self.late.pop(name, []), *([self.jobs[name]["id"]] if name in self.jobs else [])]
        self.cancelled += [f"{name}/{job}" for job in found if job != but]

    def infos(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobInfo]:
        self.asked += 1
        return {job["name"]: self._info(job) for job in jobs}

    def _info(self, job: dict[str, Any]) -> JobInfo:
        state: Any = self.states[job["name"]]
        began = job["submitted_s"]
        said: dict[str, Any] = {"submitted_s": began, "reason": "NODE_FAIL"}
        if state == "running":
            said["started_s"] = began + 7.0
        said |= self.words.get(job["name"], {})
        return JobInfo(job["id"], job["name"], state, **said)

    def estimate(self, spec: JobSpec) -> float | None:
        return None

    def cancel(self, job: dict[str, Any]) -> None:
        if self.states[job["name"]] == "unknown":
            raise SchedulerUnavailableError("no answer")
        self.cancelled.append(job["name"])
        self.states[job["name"]] = "ended"
        self.words[job["name"]] = {"outcome": "cancelled"}
        if self.trouble:
            raise self.trouble

    def script(self, spec: JobSpec) -> str:
        return ""


class Foretold(NoForecast):
    """A forecast made for the test, which keeps what it hears."""

    def __init__(self) -> None:
        self.expected_s: float | None = None
        self.heard: list[tuple[str, ...]] = []

    def wait_s(self, quantile: float = 0.5) -> float | None:
        return self.expected_s

    def remaining_s(self, info: JobInfo, age_s: float, quantile: float = 0.5) -> float | None:
        return None if self.expected_s is None else quantile * self.expected_s

    def record_submission(self, job: str) -> None:
        self.heard.append(("submission", job))

    def record_info(self, info: JobInfo) -> None:
        self.heard.append(("info", info.name, info.state))

    def record_cancellation(self, job: str, waited_s: float) -> None:
        self.heard.append(("cancellation", job))


class World:
    """One site with everything around it under the test's control."""

    def __init__(self, root: Path) -> None:
        self.clock, self.spool = FakeClock(1000.0, epoch=1e9), Spool(root)
        self.scheduler = Scheduler(self.clock)
        self.forecast, self.config, self.beat = Foretold(), {"retries": 2}, 0
        self.limits = LimitsConfig()
        self.restart()

    def restart(self, **config: Any) -> AllocationManager:
        """Begin again as a new process on the same files."""
        self.config |= config
        self.site = AllocationManager(
            self.spool,
            "run",
            "fac",
            FacilityConfig(walltime="01:00:00"),
            AllocationConfig(**self.config),
            self.scheduler,
            {"model": "tiny"},
            self.clock,
            forecast=self.forecast,
            limits=self.limits,
        )
        return self.site

    def job(self, number: int, state: str, **words: Any) -> None:
        """Let the scheduler say this of a job, from now on, when it is asked again."""
        self.scheduler.states[self.name(number)] = state
        self.scheduler.words[self.name(number)] = words
        self.clock.time += 31

    def name(self, number: int) -> str:
        return f"run-fac-a{number:04d}"

    def worker(self, number: int, state: str, **fields: Any) -> None:
        self.beat += 1
        self.alloc(number).write_state(
            WorkerState(state, beat=self.beat, **fields)  # type: ignore[arg-type]
        )

    def up(self, number: int) -> None:
        self.job(number, "running")
        self.worker(number, "ready", walltime_left_s=3000.0, seconds={"load": 2.0, "idle": 1.0})

    def saved(self, order: Order, step: int) -> None:
        """Let the worker have written a checkpoint in the middle of an order."""
        folder = self.spool.checkpoints / checkpoint_name(order.id, step)
        folder.mkdir(parents=True)
        (folder / CHECKPOINT_META).write_text("{}")

    def alloc(self, number: int) -> AllocationDir:
        return self.spool.allocation(f"a{number:04d}")

    def done(self, order: Order, state: str = "done", **fields: Any) -> None:
        self.spool.order(order.id).write_result(
            Result(order.id, state, **fields)  # type: ignore[arg-type]
        )


def order(seq: int = 0) -> Order:
    return Order("run", "fac", seq, "train", version=seq, steps=10)


class LongQueue(Foretold):
    """Every job waits three hours, and that is known."""

    def wait_s(self, quantile: float = 0.5) -> float | None:
        return 3 * HOUR

    def remaining_s(self, info: JobInfo, age_s: float, quantile: float = 0.5) -> float | None:
        return max(0.0, 3 * HOUR - age_s)


def long_queue(root: Path) -> World:
    """Return a site of one-hour jobs behind a queue of three hours."""
    world = World(root)
    world.forecast = LongQueue()
    world.restart()
    return world
