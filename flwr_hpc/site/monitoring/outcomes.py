"""How an allocation can end, and what follows from it: one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flwr_hpc.schedulers.base import JobInfo
from flwr_hpc.spool import Consequence, WorkerState

Why = Literal[
    "closed", "cancelled", "failed", "died", "interrupted", "preempted", "timeout", "node_fail",
    "out_of_memory", "removed", "lost", "held", "impossible", "rejected", "overdue", "disk",
]  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What follows from an end."""

    consequence: Consequence
    message: str = ""  # For the user, before the scheduler's or the worker's own words


RULES: dict[Why, Rule] = {
    "closed": Rule("replace"),  # the worker left on its own accord
    "cancelled": Rule("replace"),  # by us
    "failed": Rule("retry"),  # the worker says why, and whether that is fatal
    "disk": Rule("replace", "the worker could not write its folder"),  # after a pause
    "died": Rule("retry", "the job ended without a word of its worker"),
    "interrupted": Rule("retry", "the job was told to end before its time"),
    "preempted": Rule("retry", "the job was preempted"),
    "timeout": Rule("retry", "the job ran into its walltime"),
    "node_fail": Rule("retry", "the job lost a node"),
    "out_of_memory": Rule("retry", "the job ran out of memory"),
    "removed": Rule("retry", "the job was cancelled, and not by this run"),
    "lost": Rule("retry", "the scheduler knows nothing of the job any more"),
    "held": Rule("retry", "the job was held and would not have started; it was cancelled"),
    "impossible": Rule("fatal", "the job could never have started; it was cancelled"),
    "rejected": Rule("fatal"),  # at submission
    "overdue": Rule("fail", "the job waited longer than allocation.queue_deadline_s allows"),
}

# The scheduler's word on an ended job; any other is "died".
SCHEDULER_OUTCOMES: dict[str, Why] = {
    "cancelled": "removed",
    "preempted": "preempted",
    "timeout": "timeout",
    "node_fail": "node_fail",
    "out_of_memory": "out_of_memory",
    "lost": "lost",
}


def classify_ended_job(info: JobInfo, worker: WorkerState | None) -> Why:
    """Return how a job ended whose worker did not say that it leaves for good."""
    why = SCHEDULER_OUTCOMES.get(info.outcome or "", "died")
    if why == "died" and worker is not None and worker.state == "interrupted":
        return "interrupted"
    return why


def classify_pending_job(
    info: JobInfo, waited_s: float, deadline_s: float
) -> tuple[Why, str] | None:
    """Return why a job that waits is not worth waiting for, in what words; None if it is."""
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
