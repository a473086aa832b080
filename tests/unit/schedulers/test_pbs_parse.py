"""What qsub, qstat and qdel say, and what we make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worlds.schedulers.pbs_answers import AT, AT_S, job

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.schedulers.base import JobInfo, SchedulerUnavailableError
from flwr_hpc.schedulers.command import Answer, number
from flwr_hpc.schedulers.pbs.adapter import PbsScheduler
from flwr_hpc.schedulers.pbs.parse import (
    duration_s,
    qstat,
    read_job,
    read_qstat,
    read_qsub,
    short_name,
)


def test_commands() -> None:
    """Protects the requests: JSON, one id or none at all, never a user."""
    scheduler = PbsScheduler(FacilityConfig("pbs"))
    assert scheduler.submit_command(Path("/f/x.sh"), Path("/f/a b")) == [
        *("qsub", "-o", "/f/a b/pbs.out", "/f/x.sh")
    ]
    assert qstat("21.pbshost", history=True) == ["qstat", "-f", "-F", "json", "-x", "21.pbshost"]
    assert qstat() == ["qstat", "-f", "-F", "json"]
    assert scheduler.cancel_command({"id": "21.pbshost"}) == ["qdel", "21.pbshost"]


@pytest.mark.parametrize(
    ("text", "job_id"),
    [
        ("21.pbshost\n", "21.pbshost"),
        ("note of the centre\n21.pbs-01.hsn.example.gov\n", "21.pbs-01.hsn.example.gov"),
        ("", ""),
        ("nothing", ""),
    ],
)
def test_id_of_a_submitted_job(text: str, job_id: str) -> None:
    """Protects the id from what hooks of a centre print before it."""
    assert read_qsub(text) == job_id


@pytest.mark.parametrize(
    ("attributes", "state", "outcome", "stuck"),
    [
        ({"job_state": "Q", "substate": 10}, "pending", None, ""),
        ({"job_state": "Q", "comment": "Not Running: Insufficient"}, "pending", None, ""),
        ({"job_state": "Q", "comment": "Can Never Run: Insuff"}, "pending", None, "impossible"),
        ({"job_state": "H", "substate": 20}, "pending", None, "held"),
        ({"job_state": "W"}, "pending", None, ""),
        ({"job_state": "T"}, "pending", None, ""),
        ({"job_state": "R"}, "running", None, ""),
        ({"job_state": "S"}, "running", None, ""),
        ({"job_state": "E", "Exit_status": 0}, "running", None, ""),
        ({"job_state": "M"}, "unknown", None, ""),
        ({"job_state": "Z"}, "unknown", None, ""),
        ({"job_state": "F", "substate": 92, "Exit_status": 0}, "ended", "completed", ""),
        ({"job_state": "F", "substate": 92}, "ended", None, ""),  # it never ran
        ({"job_state": "F", "substate": 93, "Exit_status": 5}, "ended", "failed", ""),
        ({"job_state": "F", "substate": 93, "Exit_status": 265}, "ended", "failed", ""),
        ({"job_state": "F", "substate": 93, "Exit_status": 254}, "ended", "failed", ""),
        ({"job_state": "F", "substate": 93, "Exit_status": -29}, "ended", "timeout", ""),
        ({"job_state": "F", "substate": 93, "Exit_status": -20}, "ended", "node_fail", ""),
        ({"job_state": "F", "substate": 93, "Exit_status": -27}, "ended", "out_of_memory", ""),
        ({"job_state": "R", "run_count": 2, "Exit_status": -11}, "running", None, ""),
        ({"job_state": "F", "substate": 91, "Exit_status": 271}, "ended", "cancelled", ""),
        ({"job_state": "F", "substate": 91}, "ended", "cancelled", ""),
    ],
)
def test_states_and_ends(attributes: dict[str, Any], state: str, outcome: Any, stuck: str) -> None:
    """Protects the tables: state letter, substate, Exit_status, comment."""
    info = read_job("21.pbshost", job(**attributes))
    assert (info.state, info.outcome, info.stuck) == (state, outcome, stuck)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"job_state": "Q", "comment": "Not Running: x"}, "queued: Not Running: x"),
        ({"job_state": "H"}, "held"),
        ({"job_state": "H", "Hold_Types": "us"}, "held (user, system hold)"),
        (
            {"job_state": "F", "Exit_status": -29, "comment": "exceeded resource walltime"},
            "finished, over its walltime (Exit_status -29): exceeded resource walltime",
        ),
        ({"job_state": "F", "Exit_status": 265, "substate": 93}, "finished, killed by SIGKILL"),
        ({"job_state": "F", "Exit_status": 5}, "finished, failed (Exit_status 5)"),
        (
            {"job_state": "R", "Exit_status": -11},
            "running, put back in the queue (Exit_status -11)",
        ),
        ({"job_state": "F", "Exit_status": 271, "substate": 91}, "deleted"),
    ],
)
def test_reason_is_in_pbs_words(attributes: dict[str, Any], said: str) -> None:
    """Protects what the user is told about a job."""
    assert read_job("21.pbshost", job(**attributes)).reason == said


def test_times_nodes_and_restarts() -> None:
    """Protects the wait by PBS's own times, which have no zone, and node-hours."""
    done = job(
        job_state="F", substate=92, Exit_status=0, run_count=1, ctime=AT, etime=AT,
        stime="Fri Nov 20 08:24:49 2026", resources_used={"walltime": "100:00:15"},
        exec_host="nodea/0*4+nodeb/0*4", exec_vnode="(nodea:ncpus=4:ngpus=4)+(nodeb:ncpus=4)",
    )  # fmt: skip
    assert read_job("21.pbshost", done) == JobInfo(
        "21.pbshost", "mine", "ended", submitted_s=AT_S, eligible_s=AT_S, started_s=AT_S + 60,
        ended_s=AT_S + 60 + 360015, nodes=2, outcome="completed", reason="finished",
    )  # fmt: skip
    waiting = job(job_state="Q", Resource_List={"nodect": 3}, estimated={"start_time": AT})
    info = read_job("22.pbshost", waiting)
    assert (info.expected_start_s, info.nodes, info.started_s) == (AT_S, 3, None)


LATER = "Fri Nov 20 09:00:00 2026"


@pytest.mark.parametrize(
    ("state", "runs", "restarts", "submitted"),
    [("Q", 0, 0, AT), ("R", 1, 0, AT), ("Q", 1, 1, LATER), ("R", 2, 1, None), ("F", 2, 1, None)],
)
def test_restarts(state: str, runs: int, restarts: int, submitted: str | None) -> None:
    """Protects a second stay in the queue from counting the first run as waiting."""
    times = {"ctime": AT, "etime": AT, "mtime": LATER, "stime": AT}
    info = read_job("1.p", job(job_state=state, run_count=runs, **times))
    same = read_job("1.p", job(job_state="Q", ctime=submitted)).submitted_s
    assert (info.restarts, info.submitted_s) == (restarts, same)
    assert info.eligible_s == (None if restarts else AT_S)  # of the first stay alone


def test_the_last_run_of_a_job_that_was_put_back_has_an_end() -> None:
    """Protects the node-hours of a fast rerun, which no look sees in the queue, and its kill."""
    times = {"ctime": AT, "stime": LATER, "obittime": "Fri Nov 20 08:59:50 2026"}
    info = read_job("1.p", job(job_state="R", run_count=2, Exit_status=-11, **times))
    assert (info.submitted_s, info.restarts) == ((info.started_s or 0.0) - 10.0, 1)
    waiting = read_job("1.p", job(job_state="Q", run_count=1, mtime=LATER, **times))
    assert waiting.submitted_s == info.submitted_s
    over = {**times, "obittime": "Fri Nov 20 09:30:00 2026"}
    info = read_job("1.p", job(job_state="F", run_count=2, Exit_status=0, **over))
    assert (info.submitted_s, info.ended_s) == (None, (info.started_s or 0.0) + 1800.0)


def test_end_of_a_job_that_was_suspended() -> None:
    """Protects the end from the walltime used, which leaves out while the job stood still."""
    used = {"resources_used": {"walltime": "00:05:00"}, "obittime": "Fri Nov 20 10:00:00 2026"}
    info = read_job("1.p", job(job_state="F", Exit_status=0, run_count=1, stime=LATER, **used))
    assert info.ended_s == (info.started_s or 0.0) + 3600.0


def test_values_that_changed_their_type() -> None:
    """Protects names that qstat turns into numbers."""
    assert read_job("1.p", {"job_state": "Q", "Variable_List": {"FLWR_HPC_JOB": 12}}).name == "12"
    assert read_job("1.p", {"job_state": "Q"}).name == ""


@pytest.mark.parametrize(("text", "seconds"), [("00:00:15", 15), ("100:00:00", 360000), (90, 90)])
def test_durations(text: Any, seconds: float) -> None:
    """Protects walltimes beyond a day."""
    assert duration_s(text) == seconds


def test_broken_json_is_no_answer() -> None:
    """Protects against other users' variables that break qstat's JSON."""
    with pytest.raises(SchedulerUnavailableError, match="no JSON"):
        read_qstat(Answer("qstat", 0, '{"Jobs": {"21.p": {"a": "b"c"}}}'))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("2026-11-20_12-00-00-ab-leonardo-a0000", "flwr-ardo-a0000"),
        ("run-pbs-a0000", "flwr-pbs-a0000"),
        ("a b", "flwr-a_b"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    """Protects submission to servers that take 15 characters, a letter first."""
    assert short_name(name) == short
    assert len(short) <= 15


def test_numbers_of_ids() -> None:
    """Protects jobs of servers that go by several names."""
    assert number("21.pbshost") == number("21.pbshost.example.org") == 21
    assert number("") == -1
