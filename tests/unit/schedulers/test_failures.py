"""What it means that a batch system's command fails: a refusal is only what is known as one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from worlds.schedulers.pbs_answers import NOBODY

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.schedulers.base import JobSpec, SchedulerUnavailableError
from flwr_hpc.schedulers.command import Answer
from flwr_hpc.schedulers.pbs import failures as pbs
from flwr_hpc.schedulers.pbs.parse import read_qstat
from flwr_hpc.schedulers.slurm import failures as slurm
from flwr_hpc.schedulers.slurm.adapter import SlurmScheduler
from flwr_hpc.worker.entry import work

FAILED = "sbatch: error: Batch job submission failed: "


@pytest.mark.parametrize(
    "words",
    [
        # Seen on Slurm 22.05.8 while slurmctld died or began, 2026-11-21.
        FAILED + "Connection reset by peer",
        FAILED + "Unexpected missing socket error",
        FAILED + "Message receive failure",
        FAILED + "Unable to contact slurm controller (connect failure)",
        FAILED + "Socket timed out on send/recv operation",
        FAILED + "Zero Bytes were transmitted or received",
        FAILED + "Protocol authentication error",
        FAILED + "Resource temporarily unavailable",
        FAILED + "Requested operation is presently disabled",
        # From slurm_errno.c, of versions after that.
        FAILED + "Connection timed out reading",
        FAILED + "Rate limit exceeded, please retry momentarily",
        FAILED + "Process is shutting down and closing all communications",
        "sbatch: error: Munge encode failed: Failed to access socket",
        "some wrapper of the centre: what is that?",
        "",
    ],
)
def test_what_slurm_does_not_refuse_in_known_words_is_no_answer(words: str) -> None:
    """Protects the run, and a job that was taken all the same, from a controller that dies."""
    assert slurm.classify(Answer("sbatch", 1, "", words)) == "no answer"


@pytest.mark.parametrize(
    "words",
    [
        "sbatch: error: invalid partition specified: x\n"
        + FAILED
        + "Invalid partition name specified",
        FAILED + "Invalid account or account/partition combination specified",
        FAILED + "Invalid qos specification",
        FAILED + "Requested time limit is invalid (missing or exceeds some limit)",
        FAILED + "Requested node configuration is not available",
        FAILED + "Invalid generic resource (gres) specification",
        FAILED + "Access/permission denied",
        FAILED + "Job violates accounting/QOS policy (job submit limit, user's size and/or time "
        "limits)",
        "sbatch: error: You must state an account.\n" + FAILED + "Unspecified error",
        "sbatch: error: Invalid --mem specification",
        "sbatch: unrecognized option '--acount=x'",
        "allocation failure: Invalid account or account/partition combination specified",
    ],
)
def test_refusals_of_slurm(words: str) -> None:
    """Protects the user's time: these will be refused for ever."""
    assert slurm.classify(Answer("sbatch", 1, "", words)) == "refused"


@pytest.mark.parametrize(
    "words",
    [
        "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
        + FAILED
        + "Job violates accounting/QOS policy",
        "sbatch: error: AssocGrpSubmitJobsLimit\n" + FAILED + "Job violates accounting/QOS policy",
        FAILED + "Required partition not available (inactive or drain)",
        FAILED + "System submissions disabled",
    ],
)
def test_what_slurm_will_take_later(words: str) -> None:
    """Protects the run from a limit that passes as other jobs end."""
    assert slurm.classify(Answer("sbatch", 1, "", words)) == "not yet"


@pytest.mark.parametrize(
    ("program", "words", "meaning"),
    [
        ("squeue", "slurm_load_jobs error: Invalid job id specified", "absent"),
        ("squeue", "slurm_load_jobs error: Unexpected missing socket error", "no answer"),
        ("sacct", "Slurm accounting storage is disabled", "absent"),
        ("sacct", "sacct: error: Problem talking to the database: Connection refused", "no answer"),
        (
            "scancel",
            "scancel: error: Kill job error on job id 7: Invalid job id specified",
            "absent",
        ),
        (
            "scancel",
            "scancel: error: Kill job error on job id 7: Access/permission denied",
            "no answer",
        ),
    ],
)
def test_asking_and_cancelling_in_slurm(program: str, words: str, meaning: str) -> None:
    """Protects a living job: only these words say that it is gone."""
    assert slurm.classify(Answer(program, 1, "", words)) == meaning


@pytest.mark.parametrize(
    ("code", "words", "meaning"),
    [
        # OpenPBS 23.06.06, 2026-11-21.
        (38, "qsub: would exceed queue workq's per-user limit of jobs in 'Q' state", "not yet"),
        (39, "qsub: would exceed user u's limit on resource ncpus in queue workq", "not yet"),
        (173, "qsub: Queue is not enabled", "not yet"),
        (196, "qsub: Resource temporarily unavailable", "not yet"),
        (198, "qsub: Maximum number of jobs already in queue workq", "not yet"),
        (170, "qsub: Unknown queue", "refused"),
        (187, "qsub: Unknown resource Resource_List.x", "refused"),
        (166, "qsub: Illegal attribute or resource value Resource_List.walltime", "refused"),
        (188, "qsub: Job violates queue and/or server resource limits", "refused"),
        (2, "qsub: illegal -o value\nusage: qsub [-a date_time]", "refused"),
        (162, "qsub: cannot connect to server pbshost (errno=15010)", "no answer"),
        # From pbs_error.h and hook_func.c of that version.
        (174, "qsub: Access to queue is denied", "refused"),
        (32, "qsub: this centre wants a project", "refused"),
        (32, "qsub: alarm call while running queuejob hook 'h', request rejected", "no answer"),
        (159, "qsub: cannot connect to server pbshost (errno=15007)", "no answer"),
        (33, "qsub: hook error", "no answer"),
        (163, "qsub: PBS server internal error", "no answer"),
        (212, "qsub: Request not allowed: Server shutting down", "no answer"),
        (1, "qsub: script file:: Stale file handle", "no answer"),
        (-9, "", "no answer"),
    ],
)
def test_qsub(code: int, words: str, meaning: str) -> None:
    """Protects the line between what is refused, what passes, and what says nothing."""
    assert pbs.classify(Answer("qsub", code, "", words)) == meaning


@pytest.mark.parametrize("program", ["qstat", "qdel"])
@pytest.mark.parametrize("code", [153, 35])
def test_a_job_that_pbs_does_not_know_any_more(program: str, code: int) -> None:
    """Protects the two exit codes that are an answer; cancelling twice is no error."""
    answer = Answer(program, code, NOBODY)
    assert (pbs.classify(answer), read_qstat(answer)) == ("absent", [])


@pytest.mark.parametrize("code", [255, 1, 2, 162, 170, -15])
def test_pbs_server_down_is_no_answer(code: int) -> None:
    """Protects running jobs: without a server qstat prints valid JSON without jobs."""
    for program in ("qstat", "qdel"):
        answer = Answer(program, code, NOBODY, "cannot connect to server")
        assert pbs.classify(answer) == "no answer"


def test_a_server_without_history() -> None:
    """Protects ends from being called losses: the server says so and exits 0, or with a code."""
    said = "PBS is not configured to maintain job history"
    assert pbs.keeps_no_history(Answer("qstat", 0, NOBODY, f"{said}\n"))
    assert pbs.keeps_no_history(Answer("qstat", 36, NOBODY))
    assert not pbs.keeps_no_history(Answer("qstat", 0, NOBODY))


def test_a_login_node_without_processes_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the run from a limit of the login node on how many processes a user may have."""

    def run(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", run)
    scheduler = SlurmScheduler(FacilityConfig(), sleep=lambda _: None)
    spec = JobSpec("mine", tmp_path, FacilityConfig(), work, (str(tmp_path),))
    with pytest.raises(SchedulerUnavailableError, match="temporarily unavailable"):
        scheduler.submit(spec)
    job = {"id": "7", "name": "mine", "folder": "/f", "submitted_s": 100.0}
    assert scheduler.infos([job])["mine"].state == "unknown"
