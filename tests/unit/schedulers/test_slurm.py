"""What squeue, sacct and sbatch say, and what we make of it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import JobInfo, JobSpec, NotYetError, SchedulerUnavailableError
from flwr_hpc.schedulers.command import Answer
from flwr_hpc.schedulers.slurm.adapter import SlurmScheduler
from flwr_hpc.schedulers.slurm.parse import read_squeue, stuck
from flwr_hpc.worker.entry import work

JOB: dict[str, Any] = {"id": "7", "name": "mine", "folder": "/f", "submitted_s": 100.0}


def spec(tmp_path: Path) -> JobSpec:
    return JobSpec("mine", tmp_path, FacilityConfig(), work, (str(tmp_path),))


class Answers:
    """Stands for the commands; a missing answer is a scheduler that does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **by_command: str | None) -> None:
        self.asked: list[str] = []
        self.commands: list[list[str]] = []

        def ask(_: SlurmScheduler, command: list[str], again: bool = True) -> Answer:
            self.asked.append(command[0])
            self.commands.append(command)
            answer = by_command[command[0]]
            if answer is None:
                raise SchedulerUnavailableError(command[0])
            return Answer(command[0], 0, answer)

        monkeypatch.setattr(SlurmScheduler, "_ask", ask)


class Commands:
    """Stands for subprocess.run: pops an answer, (exit status, stdout, stderr), per call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, str, str]) -> None:
        self.answers = list(answers)
        self.pauses: list[float] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(command, *self.answers.pop(0))

        monkeypatch.setattr(subprocess, "run", run)

    def scheduler(self) -> SlurmScheduler:
        return SlurmScheduler(FacilityConfig(), sleep=self.pauses.append, wall=lambda: 1000.0)


def row(state: str, reason: str = "None", start: str = "1060", **fields: str) -> str:
    """Return a line of squeue's."""
    job = {"id": "7", "name": "mine", "eligible": "1010", "end": "1100", "restarts": "0"} | fields
    when = f"1000|{job['eligible']}|{start}|{job['end']}"
    return f"{job['id']}|{job['name']}|{state}|{when}|2|{job['restarts']}|{reason}|\n"


def past(state: str, start: str = "1060", end: str = "1100", code: str = "0:0") -> str:
    """Return a line of sacct's."""
    return f"7|mine|{state}|1000|1010|{start}|{end}|2|{code}\n"


def info(job: dict[str, Any] = JOB) -> JobInfo:
    return SlurmScheduler(FacilityConfig()).infos([job])[job["name"]]


@pytest.mark.parametrize(
    ("line", "state", "queue_s", "outcome"),
    [
        (row("PENDING", "Priority", "N/A"), "pending", None, None),
        (row("PENDING", "Resources", "2000"), "pending", None, None),  # a plan, not a start
        (row("RUNNING"), "running", 60.0, None),
        (row("COMPLETING", start="1090"), "running", None, None),  # on its way back to the queue
        (row("REQUEUED"), "pending", None, None),
        (row("CANCELLED", end="1060"), "ended", None, "cancelled"),  # while it was pending
        (row("CANCELLED"), "ended", 60.0, "cancelled"),
        (row("COMPLETED", end="1060"), "ended", 60.0, "completed"),  # in no time
        (row("FAILED", "NonZeroExitCode"), "ended", 60.0, "failed"),
        (row("OUT_OF_MEMORY", "OutOfMemory"), "ended", 60.0, "out_of_memory"),
        (row("TIMEOUT", "TimeLimit"), "ended", 60.0, "timeout"),
        (row("DEADLINE", "DeadLine"), "ended", 60.0, "timeout"),
        (row("PREEMPTED"), "ended", 60.0, "preempted"),
        (row("NODE_FAIL", "NodeDown"), "ended", 60.0, "node_fail"),
        (row("BOOT_FAIL"), "ended", 60.0, "node_fail"),
        (row("NEW_IN_SLURM_30"), "unknown", None, None),
    ],
)
def test_native_states(line: str, state: str, queue_s: float | None, outcome: str | None) -> None:
    """Protects the table of Slurm's states and the queue wait by Slurm's own times."""
    (found,) = read_squeue(line)
    assert (found.state, found.queue_s, found.outcome) == (state, queue_s, outcome)
    assert (found.ended_s is not None) == (state == "ended")
    assert (found.nodes, found.submitted_s, found.eligible_s) == (2, 1000.0, 1010.0)


def test_plan_and_restarts_of_a_requeued_job() -> None:
    """Protects forecasts from taking a plan for a start, and the count of restarts."""
    (found,) = read_squeue(row("PENDING", "BeginTime", "2000", restarts="3"))
    assert (found.expected_start_s, found.started_s, found.restarts) == (2000.0, None, 3)
    assert found.reason == "PENDING (BeginTime)"


@pytest.mark.parametrize(
    ("reasons", "verdict"),
    [
        (
            "BadConstraints,InvalidAccount,InvalidQOS,AccountNotAllowed,QOSNotAllowed,"
            "PartitionTimeLimit,PartitionNodeLimit,DependencyNeverSatisfied,MaxMemPerLimit,"
            "AssocMaxCpuPerJobLimit,AssocMaxNodePerJobLimit,AssocMaxWallDurationPerJobLimit,"
            "AssocMaxGRESPerJob,AssocMaxCPUMinutesPerJobLimit,QOSMaxNodePerJobLimit,"
            "QOSMaxMemoryPerJob,QOSMaxGRESPerNode,QOSMaxWallDurationPerJobLimit,QOSMinGRES",
            "impossible",
        ),
        (
            "JobHeldUser,JobHeldAdmin,JobHoldMaxRequeue,ReservationDeleted,"
            "launch failed requeued held,job requeued in held state,"
            "user_env_retrieval_failed_requeued_held",
            "held",
        ),
        (
            "None,Priority,Resources,Dependency,BeginTime,Licenses,PartitionDown,"
            "PartitionInactive,ReqNodeNotAvail,Reservation,AssocGrpCpuLimit,"
            "AssocGrpCPUMinutesLimit,AssocMaxJobsLimit,QOSGrpNodeLimit,QOSMaxJobsPerUserLimit,"
            "QOSMaxNodePerUserLimit,QOSMaxGRESPerUser,QOSUsageThreshold,Cleaning",
            "",
        ),
    ],
)
def test_which_pending_jobs_are_stuck(reasons: str, verdict: str) -> None:
    """Protects jobs that merely wait, and users from jobs that wait for ever."""
    for reason in reasons.split(","):
        assert stuck("PENDING", reason) == verdict, reason
    assert stuck("PENDING", "ReqNodeNotAvail, UnavailableNodes:n[1-3]") == ""
    assert stuck("REQUEUE_HOLD", "None") == "held"
    (found,) = read_squeue(row("PENDING", reasons.split(",")[0], "N/A"))
    assert found.stuck == verdict


def test_accounting_is_preferred_for_what_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the true end, who cancelled it, its exit code, and the count of its stays."""
    stays = past("REQUEUED") + past("PREEMPTED") + past("CANCELLED by 1000", "1200", "1300")
    Answers(monkeypatch, squeue=row("CANCELLED"), sacct=stays)
    found = info()
    assert (found.started_s, found.ended_s, found.restarts) == (1200.0, 1300.0, 2)
    assert (found.outcome, found.reason) == ("cancelled", "CANCELLED by 1000")
    Answers(monkeypatch, squeue=row("FAILED", "NonZeroExitCode"), sacct=past("FAILED", code="3:0"))
    assert info().reason == "FAILED, exit code 3 (NonZeroExitCode)"


def test_never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the queue's times from a job that was cancelled while it waited."""
    for start in ("None", "1100"):  # its end, where it was planned
        Answers(monkeypatch, squeue="", sacct=past("CANCELLED by 0", start))
        assert (info().started_s, info().outcome) == (None, "cancelled")


def test_reused_id_is_not_our_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against slurmctld losing a job and giving its id to another's."""
    theirs = past("RUNNING").replace("mine", "theirs")
    Answers(monkeypatch, squeue=row("RUNNING", name="theirs"), sacct=theirs)
    assert info() == JobInfo(
        "7", "mine", "ended", outcome="lost", reason="Slurm does not know the job"
    )


@pytest.mark.parametrize(
    ("squeue", "sacct", "state", "outcome"),
    [
        (row("RUNNING"), past("COMPLETED"), "running", None),
        (row("COMPLETED"), past("RUNNING", end="Unknown"), "ended", "completed"),  # sacct is late
        (row("COMPLETED"), None, "ended", "completed"),
        ("", past("COMPLETED"), "ended", "completed"),
        ("", past("RUNNING", end="Unknown"), "ended", "lost"),  # a ghost in sacct
        ("", None, "ended", "lost"),
        (None, past("COMPLETED"), "unknown", None),
        (None, None, "unknown", None),
    ],
)
def test_who_is_believed(
    squeue: str | None,
    sacct: str | None,
    state: str,
    outcome: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Protects the order of authorities; no answer from slurmctld is never an end."""
    Answers(monkeypatch, squeue=squeue, sacct=sacct)
    assert (info().state, info().outcome) == (state, outcome)


def test_job_too_young_to_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a job that was just submitted from being called lost."""
    Answers(monkeypatch, squeue="", sacct="")
    assert info(JOB | {"submitted_s": time.time()}).state == "unknown"


def test_one_request_for_many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects slurmctld: one squeue whatever the number, one sacct for what it no longer lists."""
    squeue = row("RUNNING", id="1", name="a") + row("PENDING", id="2", name="b")
    answers = Answers(monkeypatch, squeue=squeue, sacct="3|c|COMPLETED|1|1|1|2|1|0:0\n")
    jobs = [JOB | {"id": id_, "name": name} for id_, name in ("1a", "2b", "3c")]
    said = SlurmScheduler(FacilityConfig()).infos(jobs)
    assert [said[name].state for name in "abc"] == ["running", "pending", "ended"]
    assert answers.asked == ["squeue", "sacct"]
    answers.asked.clear()
    SlurmScheduler(FacilityConfig()).infos(jobs[:2])
    assert answers.asked == ["squeue"]


def test_transient_failures_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the run from a busy slurmctld, and slurmctld from the run."""
    busy = (1, "", "slurm_load_jobs error: Socket timed out on send/recv operation")
    commands = Commands(monkeypatch, busy, busy, (0, row("RUNNING"), ""))
    assert commands.scheduler().infos([JOB])["mine"].state == "running"
    assert commands.pauses == [1.0, 4.0]
    commands = Commands(monkeypatch, busy, busy, busy)
    unknown = commands.scheduler().infos([JOB])["mine"]
    assert unknown.state == "unknown"
    assert "Socket timed out" in unknown.reason
    commands = Commands(monkeypatch, busy)  # sacct, of a job that slurmctld knows has ended
    commands.answers.insert(0, (0, row("COMPLETED"), ""))
    assert commands.scheduler().infos([JOB])["mine"].outcome == "completed"
    assert commands.pauses == []
    commands = Commands(monkeypatch, (1, "", "scancel: error: Access denied"))
    scheduler = commands.scheduler()
    scheduler.pauses_s = ()
    with pytest.raises(SchedulerUnavailableError, match="Access denied"):
        scheduler.cancel(JOB)


def test_slow_failures_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects messages to the site from waiting a minute each while slurmctld is away."""
    Commands(monkeypatch, (1, "", "Unable to contact slurm controller (connect failure)"))
    times = iter([0.0, 18.0])
    scheduler = SlurmScheduler(FacilityConfig(), wall=lambda: next(times))
    assert scheduler.infos([JOB])["mine"].state == "unknown"


def test_estimate_reads_the_plan_of_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects forecasts: sbatch answers on its standard error."""
    plan = "sbatch: Job 8 to start at 1702 using 8 processors on nodes n[1-2] in partition debug"
    assert Commands(monkeypatch, (0, "", plan)).scheduler().estimate(spec(tmp_path)) == 702.0
    past_plan = plan.replace("1702", "900")
    assert Commands(monkeypatch, (0, "", past_plan)).scheduler().estimate(spec(tmp_path)) == 0.0
    assert Commands(monkeypatch, (0, "", "?")).scheduler().estimate(spec(tmp_path)) is None
    refused = (1, "", "allocation failure: Invalid account or account/partition combination")
    with pytest.raises(UserError, match="Invalid account"):
        Commands(monkeypatch, refused).scheduler().estimate(spec(tmp_path))
    away = (1, "", "allocation failure: Unable to contact slurm controller (connect failure)")
    with pytest.raises(SchedulerUnavailableError):
        Commands(monkeypatch, away, away, away).scheduler().estimate(spec(tmp_path))


def test_find_takes_the_latest_and_heals_its_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a job whose submitter died before the pickle had its name."""
    (tmp_path / "0123abcd.pkl").write_bytes(b"p")
    text = row("PENDING", id="8") + row("PENDING", id="11") + row("RUNNING", id="12", name="other")
    Answers(monkeypatch, squeue=text, sacct="", scancel="")
    job = SlurmScheduler(FacilityConfig()).find(spec(tmp_path))
    assert job is not None
    assert (job["id"], job["submitted_s"]) == ("11", 1000.0)
    assert (tmp_path / "11_submitted.pkl").exists()


@pytest.mark.parametrize("away", [False, True])
def test_find_cancels_what_a_request_that_was_given_up_has_left(
    away: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the queue and its limits from a second job: slurmctld took both requests in the end,
    and only the latest is ever asked about again."""
    rows = (("PENDING", "8", "mine"), ("RUNNING", "9", "mine"), ("COMPLETED", "10", "mine"),
            ("PENDING", "11", "mine"), ("RUNNING", "12", "other"))  # fmt: skip
    text = "".join(row(state, id=number, name=name) for state, number, name in rows)
    answers = Answers(monkeypatch, squeue=text, sacct="", scancel=None if away else "")
    job = SlurmScheduler(FacilityConfig()).find(spec(tmp_path))
    assert job is not None
    assert job["id"] == "11"
    cancelled = [command for command in answers.commands if command[0] == "scancel"]
    assert cancelled == [["scancel", "--jobname=mine", number] for number in ("8", "9")]


def test_find_does_not_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against a second job while slurmctld does not answer."""
    Answers(monkeypatch, squeue=None, sacct="")
    with pytest.raises(SchedulerUnavailableError):
        SlurmScheduler(FacilityConfig()).find(spec(tmp_path))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("sbatch: error: Batch job submission failed: Invalid account", UserError),
        ("sbatch: error: Unable to contact slurm controller", SchedulerUnavailableError),
        ("slurm_submit_batch_job: Socket timed out on send/recv", SchedulerUnavailableError),
        (
            "Batch job submission failed: Resource temporarily unavailable",
            SchedulerUnavailableError,
        ),
        ("", SchedulerUnavailableError),  # killed by the time-out
        (
            "sbatch: error: AssocMaxSubmitJobLimit\n"
            "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy",
            NotYetError,
        ),
    ],
)
def test_what_sbatch_says(
    said: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the line between 'cannot be fixed' and 'try again'."""

    with pytest.raises(error, match=r"sbatch|Slurm"):
        Commands(monkeypatch, (1, "", said)).scheduler().submit(spec(tmp_path))


def test_sbatch_without_a_job_id_may_have_taken_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against a second job where a centre's wrapper prints something else."""
    with pytest.raises(SchedulerUnavailableError, match="no job id"):
        Commands(monkeypatch, (0, "well done", "")).scheduler().submit(spec(tmp_path))


def test_a_host_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user on a wrong host from a retry loop; running jobs are not called ended."""
    monkeypatch.setenv("PATH", str(tmp_path))
    scheduler = SlurmScheduler(FacilityConfig(), sleep=lambda _: pytest.fail("tried again"))
    with pytest.raises(UserError, match="sbatch was not found on this host"):
        scheduler.submit(spec(tmp_path))
    assert scheduler.infos([JOB])["mine"].state == "unknown"


def test_environment_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects several clusters in one process, and launchers that run inside a job."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    scheduler = SlurmScheduler(FacilityConfig(env={"SLURM_CONF": "/etc/mine.conf"}))
    out = scheduler._ask(["env"]).out.splitlines()
    assert "SLURM_CONF=/etc/mine.conf" in out
    assert "SLURM_TIME_FORMAT=%s" in out
    assert not any(line.startswith("SLURM_JOB_ID") for line in out)


def test_site_defaults_give_way_to_the_facility(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the account that is charged: sbatch puts its environment above the script."""
    for name in ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_EXPORT", "SLURM_MPI_TYPE"):
        monkeypatch.setenv(name, "theirs")
    out = SlurmScheduler(FacilityConfig(account="mine"))._ask(["env"]).out
    assert "SBATCH_ACCOUNT" not in out
    assert "SBATCH_EXPORT" not in out
    assert "SBATCH_PARTITION=theirs" in out
    assert "SLURM_MPI_TYPE=theirs" in out
