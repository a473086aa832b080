"""How an allocation can end, and what follows from it: one table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flwr_hpc.schedulers.base import JobInfo
from flwr_hpc.spool import WorkerState

Why = Literal[
    "closed", "cancelled", "failed", "died", "interrupted", "preempted", "timeout", "node_fail",
    "out_of_memory", "removed", "lost", "held", "impossible", "rejected", "overdue",
]  # fmt: skip
Then = Literal["free", "again", "fail", "fatal"]


@dataclass(frozen=True)
class Rule:
    """What follows from an end."""

    # ``free`` (a replacement costs nothing), ``again`` (a replacement is held against the
    # retries, unless the order got on), ``fail`` (no replacement until asked once more) or
    # ``fatal`` (trying again will not fix it).
    then: Then
    says: str = ""  # What the user is told, before the scheduler's or the worker's own words


ENDS: dict[Why, Rule] = {
    "closed": Rule("free"),  # the worker left on its own accord
    "cancelled": Rule("free"),  # by us
    "failed": Rule("again"),  # the worker says why, and whether that is fatal
    "died": Rule("again", "the job ended without a word of its worker"),
    "interrupted": Rule("again", "the job was told to end before its time"),
    "preempted": Rule("again", "the job was preempted"),
    "timeout": Rule("again", "the job ran into its walltime"),
    "node_fail": Rule("again", "the job lost a node"),
    "out_of_memory": Rule("again", "the job ran out of memory"),
    "removed": Rule("again", "the job was cancelled, and not by this run"),
    "lost": Rule("again", "the scheduler knows nothing of the job any more"),
    "held": Rule("again", "the job was held and would not have started; it was cancelled"),
    "impossible": Rule("fatal", "the job could never have started; it was cancelled"),
    "rejected": Rule("fatal"),  # at submission
    "overdue": Rule("fail", "the job waited longer than allocation.queue_deadline_s allows"),
}

# The scheduler's word on an ended job; any other is "died".
OUTCOMES: dict[str, Why] = {
    "cancelled": "removed",
    "preempted": "preempted",
    "timeout": "timeout",
    "node_fail": "node_fail",
    "out_of_memory": "out_of_memory",
    "lost": "lost",
}


@dataclass(frozen=True)
class Verdict:
    """Why an allocation is of no more use."""

    why: Why  # Key of `ENDS`
    reason: str = ""  # For the user
    fatal: bool = False  # Trying again will not fix it
    ready: bool = False  # Whether the allocation ever had the model loaded
    # The site's complete checkpoints at that time, which tell how far an order got.
    checkpoints: list[str] = field(default_factory=list)

    @property
    def then(self) -> Then:
        """Return what follows, see `Rule`."""
        return "fatal" if self.fatal else ENDS[self.why].then


def of_job(info: JobInfo, worker: WorkerState | None) -> Why:
    """Return how a job ended whose worker did not say that it leaves for good."""
    why = OUTCOMES.get(info.outcome or "", "died")
    if why == "died" and worker is not None and worker.state == "interrupted":
        return "interrupted"
    return why


def of_pending(info: JobInfo, waited_s: float, deadline_s: float) -> tuple[Why, str] | None:
    """Return why a job that waits is not worth waiting for and what to say, None if it is."""
    words = f"{info.reason} (job {info.id})"
    if info.stuck == "impossible":
        return "impossible", words
    if info.stuck == "held":
        by_user = "JobHeldUser" in info.reason or "user hold" in info.reason.lower()
        hint = "; a person may have done that, with scontrol hold or qhold" if by_user else ""
        return "held", words + hint
    if waited_s > deadline_s:
        words = f", the scheduler says: {info.reason}" if info.reason else ""
        return "overdue", f"{waited_s:.0f} s of at most {deadline_s:.0f} s (job {info.id}){words}"
    return None
