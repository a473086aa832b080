"""The seam to a batch system: one job in, what became of it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import flwr_hpc
from flwr_hpc.config.facility import FacilityConfig

JobState = Literal["pending", "running", "ended", "unknown"]
Outcome = Literal[
    "completed", "failed", "cancelled", "preempted", "timeout", "node_fail", "out_of_memory", "lost"
]

# What it means that a command fails. ``refused``: asked again, it will be refused again; only
# what is known as that. ``not yet``: there is no such job, and the same request may be taken
# later. ``absent``: there is no such (living) job. ``no answer``: anything else; the request may
# have been taken all the same.
Failure = Literal["refused", "not yet", "absent", "no answer"]


class SchedulerUnavailableError(Exception):
    """The scheduler gave no answer, or none that says anything about the job."""


class NotYetError(SchedulerUnavailableError):
    """The scheduler did not take the job, and may take it later: there is none now."""


@dataclass(frozen=True)
class JobSpec:
    """What to run and where."""

    # Unique and reproducible: run key, facility and allocation. A job is recognised by it.
    name: str
    folder: Path  # Absolute; on the shared file system; scripts, pickles and logs of this job alone
    facility: FacilityConfig
    function: Callable[..., Any]  # Importable on the compute nodes; called in every rank
    args: tuple[Any, ...] = ()
    env: dict[str, str] = field(default_factory=dict)  # Added to the facility's
    binds: tuple[str, ...] = ()  # Folders a container has to see


@dataclass(frozen=True)
class JobInfo:
    """What the scheduler says of a job; times are its own, in Unix seconds.

    ``unknown`` means that there was no answer; it must never be read as ``ended``.
    """

    id: str
    name: str
    state: JobState
    # Of the job's latest wait in the queue, if it was put back there.
    submitted_s: float | None = None
    eligible_s: float | None = None
    started_s: float | None = None
    ended_s: float | None = None
    expected_start_s: float | None = None  # The scheduler's own plan for a pending job
    nodes: int | None = None  # How many it has, or asks for
    restarts: int = 0  # How often it was put back in the queue
    outcome: Outcome | None = None  # How an ended job ended; None if that is not known
    suspended: bool = False  # A running job stands still: its worker gives no sign of life
    # Why a pending job will not start by itself: ``held`` (somebody, or Slurm after a failed
    # launch, holds it) or ``impossible`` (the account, or a limit). Empty for any other.
    stuck: Literal["", "held", "impossible"] = ""
    reason: str = ""  # The scheduler's own words

    @property
    def queue_s(self) -> float | None:
        """Return how long the job waited, None while it does."""
        if self.submitted_s is None or self.started_s is None:
            return None
        return max(0.0, self.started_s - self.submitted_s)


class Scheduler(Protocol):
    """A batch system. A job is a JSON object as `submit` returns it.

    Attributes
    ----------
    poll_s : float
        How often the scheduler may be asked about one facility's jobs.
    """

    poll_s: float

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        """Submit a job; returns ``id``, ``name``, ``scheduler``, ``folder``, ``submitted_s``.

        Raises
        ------
        NotYetError
            It was not submitted: some limit that passes, or a queue that is closed for now.
        SchedulerUnavailableError
            No answer: it may or may not have been submitted; ask `find`.
        """

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        """Return the job that was submitted under this name, or None if there is none.

        Raises
        ------
        SchedulerUnavailableError
            If that cannot be said now.
        """

    def cancel_named(self, name: str, but: str = "") -> None:
        """End this user's living jobs of a name, but the one of the id `but`.

        Raises
        ------
        SchedulerUnavailableError
            If there may still be one.
        """

    def infos(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobInfo]:
        """Return the state of every job, by name; never raises for want of an answer.

        As few requests as the batch system allows, however many jobs.
        """

    def cancel(self, job: dict[str, Any]) -> None:
        """End the job; one that has ended is left alone.

        Raises
        ------
        SchedulerUnavailableError
            If the scheduler did not take the request.
        """

    def estimate(self, spec: JobSpec) -> float | None:
        """Return the seconds such a job would wait if submitted now; None if it does not tell.

        Submits nothing.

        Raises
        ------
        SchedulerUnavailableError
            No answer.
        """

    def script(self, spec: JobSpec) -> str:
        """Return what `submit` would run; works without the scheduler."""


def checkout() -> str:
    """Return the folder of the checkout this runs from; empty if it is installed."""
    root = Path(flwr_hpc.__file__).resolve().parents[1]
    return "" if "site-packages" in root.parts else str(root)


def heal_pickle(folder: Path, job_id: str) -> None:
    """Give a job its pickle when whoever submitted it died before renaming it.

    submitit submits first and names the pickle after the job's id next; the folder is one
    job's alone, so a nameless pickle in it is that job's.
    """
    target = folder / f"{job_id}_submitted.pkl"
    nameless = sorted(p for p in folder.glob("*.pkl") if "_" not in p.name)
    if nameless and not target.exists():
        nameless[-1].rename(target)


def stderr_tail(job: dict[str, Any], lines: int = 12) -> str:
    """Return the last lines of the rank that seems to have failed first, or ``""``."""
    files = [p for p in Path(job["folder"]).glob(f"{job['id']}_*_log.err") if p.stat().st_size]
    tails = [_tail(p, lines) for p in sorted(files, key=lambda p: p.stat().st_mtime)]
    guilty = [t for t in tails if "Error" in t]
    return (guilty or tails[-1:] or [""])[0]


def _tail(path: Path, lines: int) -> str:
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - 16384))
        text = f.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])
