"""What qsub and qstat print, read: pure functions, and tables of PBS's words.

Read so on OpenPBS 23.06.
"""

from __future__ import annotations

import json
import re
import signal
import time
from typing import Any

from flwr_hpc.schedulers.base import JobInfo, JobState, Outcome
from flwr_hpc.schedulers.command import Answer, GarbledAnswerError

# A job's full name, in its environment (-v) and so in its Variable_List; -N may be too short.
NAME = "FLWR_HPC_JOB"

_STATES: dict[str, tuple[JobState, str]] = {
    "Q": ("pending", "queued"),
    "H": ("pending", "held"),
    "W": ("pending", "waiting for its start time"),
    "T": ("pending", "in transit"),
    "R": ("running", "running"),
    "E": ("running", "exiting"),
    "S": ("running", "suspended"),
    "U": ("running", "suspended while its node is in use"),
    "B": ("running", "array begun"),
    "X": ("ended", "finished"),
    "F": ("ended", "finished"),
    "M": ("unknown", "moved to another server"),
}
_DELETED = 91  # substate; 92 and 93 say less than Exit_status
# Exit_status below 0 are PBS's own words, JOB_EXEC_* in its job.h.
_EXITS = {
    -29: "over its walltime",
    -27: "over its memory",
    -26: "over its virtual memory",
    -20: "a node failed",
    -14: "put back in the queue since a node failed",
    -11: "put back in the queue",  # by qrerun, or to make room
    127: "command or interpreter not found",
    254: "could not be executed",
}
_SIGNALLED = 256
_HOLDS = ("user", "operator", "system")


def read_qsub(text: str) -> str:
    """Return the job's id, e.g. ``21.pbshost``; ``""`` if there is none."""
    ids = re.findall(r"^\s*(\d+\.\S+)\s*$", text, flags=re.MULTILINE)
    return ids[-1] if ids else ""


def qstat(job_id: str = "", history: bool = False) -> list[str]:
    """Return the command that shows one job, or all of them.

    Of several ids the JSON holds only the first, and ``-u`` cannot be combined with it.
    """
    return [
        "qstat",
        "-f",
        "-F",
        "json",
        *(["-x"] if history else []),
        *([job_id] if job_id else []),
    ]


def read_qstat(answer: Answer) -> list[JobInfo]:
    """Read the jobs in qstat's answer; none if it does not know the one that was asked for."""
    if answer.code:
        return []
    try:
        jobs = json.loads(answer.out, strict=False).get("Jobs", {})
    except ValueError as exc:
        raise GarbledAnswerError(f"qstat: its answer is no JSON: {exc}") from None
    return [read_job(job_id, job) for job_id, job in jobs.items()]


def read_job(job_id: str, job: dict[str, Any]) -> JobInfo:
    """Read one of qstat's jobs; a job without our name has the name ``""``."""
    letter = str(job.get("job_state", ""))
    state, word = _STATES.get(letter, ("unknown", f"state {letter}"))
    runs = int(job.get("run_count", 0))
    restarts = runs if state == "pending" else max(0, runs - 1)
    started = _epoch(job.get("stime")) if state in ("running", "ended") else None
    said = str(job.get("comment", "")).strip()
    return JobInfo(
        job_id,
        # Values that look like numbers may come as such.
        str(job.get("Variable_List", {}).get(NAME, "")),
        state,
        submitted_s=_submitted(job, state, restarts),
        eligible_s=_epoch(job.get("etime")) if not restarts else None,
        started_s=started,
        ended_s=_end(job, started) if state == "ended" else None,
        expected_start_s=_expected(job) if state == "pending" else None,
        nodes=_nodes(job),
        restarts=restarts,
        outcome=_outcome(job) if state == "ended" else None,
        suspended=letter in ("S", "U"),
        stuck=_stuck(letter, said),
        reason=": ".join(filter(None, (_with_exit(word, job), said))),
    )


def short_name(name: str) -> str:
    """Return a name for ``-N``: at most 15 characters, a letter first, for people to read."""
    return "flwr-" + re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-10:].lstrip("-_.")


def duration_s(text: str | float) -> float:
    """Return the seconds of ``HH:MM:SS``, ``MM:SS`` or a number."""
    seconds = 0.0
    for part in str(text).split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _submitted(job: dict[str, Any], state: JobState, restarts: int) -> float | None:
    """Return when it entered the queue this time: if it was put back, as its last run ended.

    Where that is not kept its last change, while it waits, stands for it: never too early, so no
    wait seems too long.
    """
    if not restarts:
        return _epoch(job.get("ctime"))
    ended, started = _epoch(job.get("obittime")), _epoch(job.get("stime"))
    if state == "pending":
        return _epoch(job.get("mtime")) if ended is None else ended
    between = ended is not None and started is not None and ended <= started
    return ended if between else None  # else it has ended since


def _stuck(letter: str, said: str) -> Any:
    if letter == "H":
        return "held"
    return "impossible" if letter == "Q" and "can never run" in said.lower() else ""


def _outcome(job: dict[str, Any]) -> Outcome | None:
    """Judge by Exit_status first: substate 92 alone is no success."""
    code = _exit_status(job)
    if code == -29:
        return "timeout"
    if job.get("substate") == _DELETED:
        return "cancelled"
    if code in (-20, -14):
        return "node_fail"
    if code in (-27, -26):
        return "out_of_memory"
    if code == -11:
        return "preempted"
    if code is None:  # it never ran
        return None
    return "failed" if code else "completed"


def _with_exit(word: str, job: dict[str, Any]) -> str:
    code = _exit_status(job)
    if job.get("job_state") == "F" and job.get("substate") == _DELETED:
        return "deleted"
    if job.get("job_state") == "H":
        kinds = [kind for kind in _HOLDS if kind[0] in str(job.get("Hold_Types", ""))]
        return f"{word} ({', '.join(kinds)} hold)" if kinds else word
    if not code:
        return word
    if code > _SIGNALLED:
        return f"{word}, killed by {_signal(code - _SIGNALLED)}"
    return f"{word}, {_EXITS.get(code, 'failed')} (Exit_status {code})"


def _signal(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _exit_status(job: dict[str, Any]) -> int | None:
    return int(job["Exit_status"]) if "Exit_status" in job else None


def _expected(job: dict[str, Any]) -> float | None:
    """Return the start of a job that the scheduler has planned."""
    return _epoch(job.get("estimated", {}).get("start_time"))


def _end(job: dict[str, Any], started: float | None) -> float | None:
    """Return when a job ended; ``resources_used`` leaves out while it was suspended."""
    ended = _epoch(job.get("obittime"))
    if ended is not None and ended >= (started or 0.0):
        return ended
    used = job.get("resources_used", {}).get("walltime")
    if started is not None and used is not None:
        return started + duration_s(used)
    return _epoch(job.get("mtime"))


def _nodes(job: dict[str, Any]) -> int | None:
    """Return the nodes it has, else those it asks for."""
    hosts = {place.partition("/")[0] for place in str(job.get("exec_host", "")).split("+")}
    if hosts != {""}:
        return len(hosts)
    asked = job.get("Resource_List", {}).get("nodect")
    return int(asked) if asked is not None else None


def _epoch(value: Any) -> float | None:
    """Return Unix seconds of ``Fri Nov 20 08:23:49 2026``, which is this host's local time."""
    if value is None:
        return None
    text = str(value)
    if text.isdigit():
        return float(text)
    try:
        return time.mktime(time.strptime(text, "%a %b %d %H:%M:%S %Y"))
    except ValueError:
        return None
