"""What squeue, sacct and sbatch say, and what we make of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import FailedJobError

from flwr_hpc.config import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.jobs.entry import work
from flwr_hpc.jobs.scheduler import JobSpec, SchedulerUnavailableError
from flwr_hpc.jobs.slurm import SlurmScheduler, TemplateExecutor, parse_jobs

JOB: dict[str, Any] = {"id": "7", "name": "mine", "folder": "/f", "submitted_s": 100.0}


def spec(tmp_path: Path) -> JobSpec:
    return JobSpec("mine", tmp_path, FacilityConfig(), work, (str(tmp_path),))


class Answers:
    """Stands for the commands; a missing answer is a scheduler that does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **by_command: str | None) -> None:
        self.asked: list[str] = []

        def ask(_: SlurmScheduler, command: list[str], missing: str = "") -> str:
            self.asked.append(command[0])
            answer = by_command[command[0]]
            if answer is None:
                raise SchedulerUnavailableError(command[0])
            return answer

        monkeypatch.setattr(SlurmScheduler, "_ask", ask)


@pytest.mark.parametrize(
    ("line", "state", "queue_s"),
    [
        ("7|mine|PENDING|1000|N/A|Priority", "pending", None),
        ("7|mine|PENDING|1000|2000|Resources", "pending", None),  # a forecast, not a start
        ("7|mine|RUNNING|1000|1060|None", "running", 60.0),
        ("7|mine|COMPLETING|1000|1060|None", "running", 60.0),
        ("7|mine|REQUEUED|1000|1060|None", "pending", None),
        ("7|mine|CANCELLED by 1000|1000|Unknown|None", "ended", None),
        ("7|mine|OUT_OF_MEMORY|1000|1060|OutOfMemory", "ended", 60.0),
        ("7|mine|TIMEOUT|1000|1060|TimeLimit", "ended", 60.0),
        ("7|mine|NEW_IN_SLURM_30|1000|1060|None", "unknown", None),
    ],
)
def test_native_states(line: str, state: str, queue_s: float | None) -> None:
    """Protects the table of Slurm's states and the queue wait by Slurm's own times."""
    (info,) = parse_jobs(line, "mine")
    assert (info.state, info.queue_s) == (state, queue_s)


def test_reason_is_in_slurms_words() -> None:
    """Protects what the user is told about a job that died."""
    (info,) = parse_jobs("7|mine|TIMEOUT|1|2|TimeLimit", "mine")
    assert info.reason == "TIMEOUT (TimeLimit)"


def test_reused_id_is_not_our_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against slurmctld losing a job and giving its id to another's."""
    other = "7|theirs|RUNNING|1000|1060|None\n"
    Answers(monkeypatch, squeue=other, sacct=other)
    info = SlurmScheduler(FacilityConfig()).info(JOB)
    assert (info.state, info.reason) == ("ended", "Slurm does not know the job")


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        ("7|mine|RUNNING|1|2|None", None, "running"),
        ("", "7|mine|COMPLETED|1|2|None", "ended"),
        ("", "7|mine|RUNNING|1|2|None", "ended"),  # lost by slurmctld, a ghost in sacct
        ("", None, "ended"),
        (None, "7|mine|COMPLETED|1|2|None", "unknown"),
        (None, None, "unknown"),
    ],
)
def test_who_is_believed(
    squeue: str | None, sacct: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the order of authorities; no answer from slurmctld is never an end."""
    if sacct is None and squeue == "":
        monkeypatch.setattr(SlurmScheduler, "_accounting", lambda *_: "")
    Answers(monkeypatch, squeue=squeue, sacct=sacct)
    assert SlurmScheduler(FacilityConfig()).info(JOB).state == state


def test_job_too_young_to_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a job that was just submitted from being called lost."""
    Answers(monkeypatch, squeue="", sacct="")
    young = JOB | {"submitted_s": time.time()}
    assert SlurmScheduler(FacilityConfig()).info(young).state == "unknown"


def test_find_takes_the_latest_and_heals_its_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a job whose submitter died before the pickle had its name."""
    (tmp_path / "0123abcd.pkl").write_bytes(b"p")
    text = "8|mine|PENDING|1000|N/A|None\n11|mine|PENDING|1001|N/A|None\n12|other|RUNNING|1|2|\n"
    Answers(monkeypatch, squeue=text, sacct="")
    job = SlurmScheduler(FacilityConfig()).find(spec(tmp_path))
    assert job is not None
    assert (job["id"], job["submitted_s"]) == ("11", 1001.0)
    assert (tmp_path / "11_submitted.pkl").exists()


def test_find_does_not_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against a second job while slurmctld does not answer."""
    Answers(monkeypatch, squeue=None, sacct="")
    with pytest.raises(SchedulerUnavailableError):
        SlurmScheduler(FacilityConfig()).find(spec(tmp_path))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("sbatch: error: Batch job submission failed: Invalid account", UserError),
        ("env: ‘sbatch’: No such file or directory", UserError),  # noqa: RUF001
        ("sbatch: error: Unable to contact slurm controller", SchedulerUnavailableError),
        ("slurm_submit_batch_job: Socket timed out on send/recv", SchedulerUnavailableError),
        ("", SchedulerUnavailableError),  # killed by the time-out
    ],
)
def test_what_sbatch_says(
    said: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the line between 'will not mend' and 'try again'."""

    def submit(*_: Any) -> None:
        raise FailedJobError(said)

    monkeypatch.setattr(TemplateExecutor, "submit", submit)
    with pytest.raises(error):
        SlurmScheduler(FacilityConfig()).submit(spec(tmp_path))


def test_environment_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects several clusters in one process, and launchers that run inside a job."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    scheduler = SlurmScheduler(FacilityConfig(env={"SLURM_CONF": "/etc/mine.conf"}))
    out = scheduler._ask(["env"]).splitlines()
    assert "SLURM_CONF=/etc/mine.conf" in out
    assert "SLURM_TIME_FORMAT=%s" in out
    assert not any(line.startswith("SLURM_JOB_ID") for line in out)
