"""What the files of a site's folder hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import from_dict, to_json

T = TypeVar("T")


@dataclass(frozen=True)
class RecordFile(Generic[T]):
    """A file that holds one record."""

    path: Path
    kind: type[T]

    def read(self) -> T | None:
        """Return the record, None while there is none."""
        raw = read_json(self.path)
        return None if raw is None else from_dict(self.kind, raw)

    def write(self, record: T) -> None:
        publish(self.path, to_json(record))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class WorkerState:
    """What the worker of an allocation says of itself."""

    # ``starting`` (imports, process group), ``loading`` (model, data), ``ready``, ``running``
    # (an order), ``closed`` (left on its own accord: released, idle too long, or out of
    # walltime), ``interrupted`` (told to end; whether its job is requeued only the scheduler
    # knows), ``failed``.
    state: Literal["starting", "loading", "ready", "running", "closed", "interrupted", "failed"]
    order_id: str = ""  # Of the running order
    beat: int = 0  # Grows while the worker lives
    walltime_left_s: float | None = None  # Until the job's end, on the worker's clock
    # Time so far in ``startup``, ``load``, ``train``, ``evaluate``, ``transfer``, ``idle``.
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""  # Set when ``failed``; trying again will not fix a fatal one
    fatal: bool = False
    disk: bool = False  # It failed since its folder cannot be written


@dataclass(frozen=True)
class Answering:
    """What the ClientApp of a site is doing."""

    message: str  # Flower's id of the message
    kind: str = ""
    beat: int = 0  # Grows while it works on it
    answered: bool = False


@dataclass(frozen=True)
class SubmissionMark:
    """A job may have been submitted although it is not written down."""

    since_s: float  # Of the first try, in Unix seconds
    until_s: float = 0.0  # A request may be on its way until then; 0: none is
    sent: int = 0  # Requests that were taken, or may be, however late


@dataclass(frozen=True)
class QueueCycle:
    """One wait of a job in the queue and the run after it, in the scheduler's Unix seconds."""

    submitted_s: float | None = None
    eligible_s: float | None = None
    started_s: float | None = None  # None if the job ended in the queue
    ended_s: float | None = None


@dataclass(frozen=True)
class JobTimes:
    """When a job waited and ran; a job that was put back in the queue has several cycles."""

    id: str
    nodes: int | None = None
    restarts: int = 0
    outcome: str | None = None
    cycles: list[QueueCycle] = field(default_factory=list)

    def __post_init__(self) -> None:
        read = [QueueCycle(**c) if isinstance(c, dict) else c for c in self.cycles]
        object.__setattr__(self, "cycles", read)


@dataclass(frozen=True)
class LeftOut:
    """Why the run goes on without the site."""

    reason: str  # For its people; the server was told the same


@dataclass(frozen=True)
class Heartbeat:
    """A worker's beat, as the launcher saw it."""

    beat: int
    first_seen_s: float  # Unix seconds
    restarts: int = 0  # Of its job at that time
    outdated: bool = False  # From before the job's present start


@dataclass(frozen=True)
class SchedulerAnswer:
    """What the scheduler said of a site's jobs."""

    asked_s: float = float("-inf")  # Unix seconds
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # `JobInfo`, by job name


# What follows from an end: ``replace`` (a new allocation costs nothing), ``retry`` (it is held
# against the retries, unless the order got on), ``fail`` (none until asked once more) or
# ``fatal`` (trying again will not fix it).
Consequence = Literal["replace", "retry", "fail", "fatal"]


@dataclass(frozen=True)
class Verdict:
    """Why an allocation is of no more use."""

    why: str  # See `flwr_hpc.site.monitoring.outcomes.RULES`
    consequence: Consequence
    reason: str = ""  # For the user
    was_ready: bool = False  # Whether the allocation ever had the model loaded
    # The site's complete checkpoints at that time, which tell how far an order got.
    checkpoints: list[str] = field(default_factory=list)
    at_s: float = 0.0  # Unix seconds
