"""What sbatch, squeue and sacct print, read: pure functions, and tables of Slurm's words."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from flwr_hpc.schedulers.base import JobInfo, JobState, Outcome

# A column without a width is not cut; the reason may hold anything and comes last.
_COLUMNS = "JobID,Name,State,SubmitTime,EligibleTime,StartTime,EndTime,NumNodes,RestartCnt,Reason"
SQUEUE = ["--noheader", "--states=all", "--Format=" + _COLUMNS.replace(",", ":|,") + ":|"]
# One row for every wait in the queue. sacct has no restarts before Slurm 23.
_FIELDS = "JobID,JobName,State,Submit,Eligible,Start,End,NNodes,ExitCode"
SACCT = ["-X", "-D", "--noheader", "--parsable2", "-o", _FIELDS]

# Slurm's states; those not listed are "unknown".
_NATIVE: dict[JobState, str] = {
    "pending": "CONFIGURING PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT",
    "running": "COMPLETING RESIZING RUNNING SIGNALING STAGE_OUT STOPPED SUSPENDED",
}
_OUTCOMES: dict[str, Outcome] = {
    "BOOT_FAIL": "node_fail",
    "CANCELLED": "cancelled",
    "COMPLETED": "completed",
    "DEADLINE": "timeout",
    "FAILED": "failed",
    "NODE_FAIL": "node_fail",
    "OUT_OF_MEMORY": "out_of_memory",
    "PREEMPTED": "preempted",
    "REVOKED": "cancelled",
    "TIMEOUT": "timeout",
}
_STATES: dict[str, JobState] = {
    **{word: state for state, words in _NATIVE.items() for word in words.split()},
    **dict.fromkeys(_OUTCOMES, "ended"),
}

# Reasons why a pending job will never start, without spaces and in lower case: bad requests, and
# limits that one job by itself exceeds. What other jobs use up is ordinary waiting.
_IMPOSSIBLE = re.compile(
    r"badconstraints|dependencyneversatisfied|deadline|invalidaccount|invalidqos"
    r"|accountnotallowed|qosnotallowed|partition(time|node)limit|maxmemperlimit"
    r"|associationtimelimit|qosmin.*|(assoc|qos)max.*(perjob|pernode|walldurationper).*"
)
# So named, or "launch failed requeued held", "job requeued in held state", ...
_HELD = re.compile(r"jobheld(user|admin)|jobholdmaxrequeue|reservationdeleted|.*requeued.*held.*")
_HELD_STATES = ("REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")


def stuck(state: str, reason: str) -> Literal["", "held", "impossible"]:
    """Return why a pending job will not start by itself, from Slurm's state and reason."""
    word = re.sub(r"[\s_]", "", reason).lower()
    if state in _HELD_STATES or _HELD.fullmatch(word):
        return "held"
    return "impossible" if _IMPOSSIBLE.fullmatch(word) else ""


def read_squeue(text: str) -> list[JobInfo]:
    """Read what squeue printed with `SQUEUE`."""
    bars = _COLUMNS.count(",")
    rows = (line.strip().split("|", bars) for line in text.splitlines())
    return [_live(*row) for row in rows if len(row) == bars + 1]


def read_sacct(text: str) -> list[JobInfo]:
    """Read what sacct printed with `SACCT`: the latest wait of every job."""
    latest: dict[tuple[str, str], JobInfo] = {}
    for line in text.splitlines():
        row = line.strip().split("|")
        if len(row) == _FIELDS.count(",") + 1:
            info = _past(*row)
            before = latest.get((info.id, info.name))
            restarts = 0 if before is None else before.restarts + 1
            latest[info.id, info.name] = replace(info, restarts=restarts)
    return list(latest.values())


def read_start(text: str) -> float | None:
    """Read when ``sbatch --test-only`` would start the job, in Unix seconds."""
    found = re.search(r"to start at (\d+)", text)
    return float(found[1]) if found else None


def read_sbatch(text: str) -> str:
    """Read the id of a submitted job; ``""`` if there is none."""
    found = re.search(r"job (\d+)", text)
    return found[1] if found else ""


def merge(now: JobInfo | None, then: JobInfo | None) -> JobInfo | None:
    """Return what holds of a job, None if neither slurmctld nor the accounting knows it.

    slurmctld alone knows what lives; the accounting is preferred for what has ended.
    """
    if then is None or then.state != "ended":  # late, or a ghost that slurmctld has lost
        return now
    if now is None:
        return then
    said = now.reason.partition(" (")[2]
    return replace(
        then,
        nodes=now.nodes,
        restarts=max(now.restarts, then.restarts),
        reason=f"{then.reason} ({said}" if said else then.reason,
    )


def _live(
    id_: str, name: str, native: str, submit: str, eligible: str, start: str, end: str,
    nodes: str, restarts: str, reason: str,
) -> JobInfo:  # fmt: skip
    reason = reason.rstrip("| ")
    reason = "" if reason == "None" else reason
    told = f"{native} ({reason})" if reason else native
    job = _job(id_, name, native, submit, eligible, start, end, nodes, told)
    return replace(
        job,
        expected_start_s=_epoch(start) if job.state == "pending" else None,
        restarts=int(restarts) if restarts.isdigit() else 0,
        suspended=native in ("SUSPENDED", "STOPPED"),
        stuck=stuck(native, reason) if job.state == "pending" else "",
    )


def _past(
    id_: str, name: str, native: str, submit: str, eligible: str, start: str, end: str,
    nodes: str, code: str,
) -> JobInfo:  # fmt: skip
    word = (native.split() or [""])[0].rstrip("+")  # "CANCELLED by 1000"
    exit_code, _, signal = code.partition(":")
    codes = [f"exit code {exit_code}"] if exit_code not in ("", "0") else []
    codes += [f"signal {signal}"] if signal not in ("", "0") else []
    reason = ", ".join([native, *codes])
    return _job(id_, name, word, submit, eligible, start, end, nodes, reason)


def _job(
    id_: str, name: str, word: str, submit: str, eligible: str, start: str, end: str,
    nodes: str, reason: str,
) -> JobInfo:  # fmt: skip
    state = _STATES.get(word, "unknown")
    return JobInfo(
        id_,
        name,
        state,
        submitted_s=_epoch(submit),
        eligible_s=_epoch(eligible),
        started_s=_started(state, word, start, end),
        ended_s=_epoch(end) if state == "ended" else None,  # else: a plan
        nodes=int(nodes) if nodes.isdigit() else None,
        outcome=_OUTCOMES.get(word),
        reason=reason,
    )


def _started(state: JobState, word: str, start: str, end: str) -> float | None:
    if _OUTCOMES.get(word) in ("cancelled", "timeout") and start == end:
        return None  # ended while it was pending
    if word == "COMPLETING":
        return None  # of a job being requeued Slurm says when that began
    return _epoch(start) if state in ("running", "ended") else None


def _epoch(text: str) -> float | None:
    return float(text) if text.isdigit() else None  # else "N/A", "None", "Unknown"
