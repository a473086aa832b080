"""Submitting to PBS, asking about jobs, and the job script."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
from worlds.schedulers.pbs_answers import AT, AT_S, NOBODY, answer, job

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import JobSpec, NotYetError, SchedulerUnavailableError
from flwr_hpc.schedulers.command import Answer
from flwr_hpc.schedulers.pbs.adapter import PbsScheduler, script
from flwr_hpc.schedulers.pbs.parse import (
    qstat,
)
from flwr_hpc.schedulers.registry import check_facility, rules_of
from flwr_hpc.worker.entry import work

JOB: dict[str, Any] = {"id": "21.pbshost", "name": "mine", "folder": "/f", "submitted_s": 100.0}


def spec(tmp_path: Path, **fields: Any) -> JobSpec:
    return JobSpec("mine", tmp_path, FacilityConfig("pbs", **fields), work, (str(tmp_path),))


class Qstat:
    """Stands for the commands: exit code, output by the words of a command."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: tuple[int, str]) -> None:
        self.asked: list[list[str]] = []

        def once(_: PbsScheduler, command: list[str], stdin: str, timeout_s: float) -> Answer:
            self.asked.append(command)
            key = (
                command[0] if command[0] != "qstat" else "all" if command[-1][0] in "-j" else "one"
            )
            code, out = answers[key]
            if "-x" in command and "history" in answers:
                code, out = answers["history"]
            return Answer(command[0], code, out, "words")

        monkeypatch.setattr(PbsScheduler, "_once", once)
        monkeypatch.setattr(PbsScheduler, "pauses_s", ())


def test_one_job_is_asked_about_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the server: its list of all jobs may be long."""
    commands = Qstat(monkeypatch, one=(0, answer(j21=job())))
    assert PbsScheduler(FacilityConfig("pbs")).infos([JOB])["mine"].state == "running"
    assert commands.asked == [qstat("21.pbshost")]


def test_several_jobs_are_asked_about_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the limit of two requests a minute, however many jobs live."""
    other = job(Variable_List={"FLWR_HPC_JOB": "other"}, job_state="Q")
    live = answer(j7=job(Variable_List={}), j21=job(), j22=other)
    commands = Qstat(monkeypatch, all=(0, live))
    infos = PbsScheduler(FacilityConfig("pbs")).infos([JOB, JOB | {"id": "22.p", "name": "other"}])
    assert {name: info.state for name, info in infos.items()} == {
        "mine": "running",
        "other": "pending",
    }
    assert commands.asked == [qstat()]


def test_a_job_missing_in_the_list_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the end of one job among several, and against a list nobody can read."""
    done = answer(j21=job(job_state="F", Exit_status=0))
    two = [JOB, JOB | {"id": "22.pbshost", "name": "other"}]
    for listed in (NOBODY, "{broken"):
        Qstat(monkeypatch, all=(0, listed), one=(0, done))
        infos = PbsScheduler(FacilityConfig("pbs")).infos(two)
        assert (infos["mine"].outcome, infos["other"].outcome) == ("completed", "lost")


def test_server_down_says_nothing_about_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects all jobs of a site while its server is away."""
    Qstat(monkeypatch, all=(255, NOBODY), one=(255, NOBODY))
    scheduler = PbsScheduler(FacilityConfig("pbs"))
    two = [JOB, JOB | {"id": "22.pbshost", "name": "other"}]
    for jobs in ([JOB], two):
        assert {info.state for info in scheduler.infos(jobs).values()} == {"unknown"}
    with pytest.raises(SchedulerUnavailableError):
        scheduler.cancel(JOB)


@pytest.mark.parametrize(
    ("age_s", "answers", "state", "outcome"),
    [
        (10, {"one": (153, NOBODY)}, "unknown", None),  # too young to be called lost
        (3600, {"one": (153, NOBODY)}, "ended", "lost"),
        (3600, {"one": (153, NOBODY), "history": (36, NOBODY)}, "ended", None),
        (3600, {"one": (0, answer(j21=job())), "history": (0, NOBODY)}, "running", None),
        (3600, {"one": (0, answer(j21=job(Variable_List={})))}, "ended", "lost"),  # another's
    ],
)
def test_unknown_jobs(
    age_s: float, answers: Any, state: str, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects young jobs, and servers that keep no history."""
    Qstat(monkeypatch, **answers)
    info = PbsScheduler(FacilityConfig("pbs"), wall=lambda: 100.0 + age_s).infos([JOB])["mine"]
    assert (info.state, info.outcome) == (state, outcome)


def test_only_our_own_job_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects other people's jobs, and finished ones from a needless request."""
    for attributes in ({"Variable_List": {}}, {"job_state": "F"}):
        commands = Qstat(monkeypatch, one=(0, answer(j21=job(**attributes))))
        PbsScheduler(FacilityConfig("pbs")).cancel(JOB)
        assert [c[0] for c in commands.asked] == ["qstat"]


def test_find_takes_the_latest_and_heals_its_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a job whose submitter died before the pickle had its name."""
    (tmp_path / "0123abcd.pkl").write_bytes(b"p")
    jobs = answer(j9=job(job_state="F"), j21=job(ctime=AT), j22=job(Variable_List={}))
    Qstat(monkeypatch, all=(0, jobs))
    found = PbsScheduler(FacilityConfig("pbs")).find(spec(tmp_path))
    assert found is not None
    assert (found["id"], found["submitted_s"]) == ("21.pbshost", AT_S)
    assert (tmp_path / "21.pbshost_submitted.pkl").exists()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (170, UserError),  # unknown queue
        (166, UserError),  # bad value
        (187, UserError),  # unknown resource
        (188, UserError),  # over the queue's limits
        (127, UserError),  # no qsub
        (38, NotYetError),  # a limit on jobs
        (173, NotYetError),  # the queue is not enabled
        (162, SchedulerUnavailableError),
        (255, SchedulerUnavailableError),
        (124, SchedulerUnavailableError),  # no answer in time
        (1, SchedulerUnavailableError),  # in no words that are known
    ],
)
def test_what_qsub_says(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the line between 'cannot be fixed' and 'try again'."""

    Qstat(monkeypatch, qsub=(code, ""))
    with pytest.raises(error, match=r"qsub|PBS"):
        PbsScheduler(FacilityConfig("pbs")).submit(spec(tmp_path))


def test_commands_that_fail_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against a server that is busy for a moment."""
    codes, pauses = [255, 255, 0], []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, codes.pop(0), answer(j21=job()), "")

    monkeypatch.setattr(subprocess, "run", run)
    scheduler = PbsScheduler(FacilityConfig("pbs"), sleep=pauses.append)
    assert scheduler.infos([JOB])["mine"].state == "running"
    assert pauses == [1.0, 4.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "run,1-pbs-a0000"}, "list of variables"),
        ({"name": "it's-pbs-a0000"}, "list of variables"),
        ({"name": 'a"b'}, "list of variables"),
        ({"folder": Path("/scratch/Möller/run")}, "no letters beyond ASCII"),
    ],
)
def test_what_qsub_cannot_be_given(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Protects the user from qsub's usage text, and from a job that nobody finds by its name."""
    with pytest.raises(UserError, match=words):
        script(dataclasses.replace(spec(tmp_path), **changes))


def test_working_directory_is_checked_before_anything_starts() -> None:
    """Protects the same where the folder is known from the configuration alone."""
    with pytest.raises(UserError, match="workdir=/scratch/Möller"):
        check_facility("mine", FacilityConfig("pbs", None, workdir="/scratch/Möller"))
    check_facility("mine", FacilityConfig("pbs", None, workdir="/scratch/a b:c,d'e%"))


def test_server_is_named_the_way_of_pbs() -> None:
    """Protects PBS's users from advice about SLURM_CONF."""
    rules = rules_of(FacilityConfig("pbs"))
    assert rules.other_cluster == "env.PBS_SERVER=NAME"
    words = [*rules.refusals.values(), rules.accounting.without if rules.accounting else ""]
    assert not any("slurm" in word.lower() for word in words)


def test_script_asks_for_the_shape(tmp_path: Path) -> None:
    """Protects the request: chunk, place, walltime without days, queue, and the launcher."""
    shape = {"nodes": 2, "ranks_per_node": 4, "gpus_per_node": 4, "cpus_per_rank": 8}
    text = script(
        spec(
            tmp_path,
            account="p1",
            partition="prod",
            walltime="1-02:30:00",
            mpi="openmpi",
            options={"place": "scatter:excl", "filesystems": "home"},
            launcher_args=["-x", "A"],
            **shape,
        )
    )
    for line in (
        "#PBS -l select=2:ncpus=32:ngpus=4:mpiprocs=4",
        "#PBS -l place=scatter:excl",
        "#PBS -l filesystems=home",
        "#PBS -l walltime=26:30:00",
        "#PBS -q prod",
        "#PBS -A p1",
        "#PBS -v FLWR_HPC_JOB=mine",
        "mpiexec -n 8 --map-by ppr:4:node -x A \\",
    ):
        assert f"{line}\n" in text
    assert "ngpus" not in script(spec(tmp_path))
    assert "#PBS -l select=1\n" in script(spec(tmp_path, chunk=""))
