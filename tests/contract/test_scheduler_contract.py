"""What every batch system must do: this host, fakes, a real cluster, one from outside."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import worker as fake_worker
from worlds.jobs import facility, processes_of, until

from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import (
    JobInfo,
    JobSpec,
    Scheduler,
    SchedulerUnavailableError,
    stderr_tail,
)
from flwr_hpc.schedulers.command import CommandScheduler
from flwr_hpc.schedulers.registry import make_scheduler, rules_of

KINDS = ["local", "fake_slurm", "fake_pbs", "dummy", pytest.param("slurm", marks=pytest.mark.slurm)]


@pytest.fixture(params=KINDS)
def spec(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[JobSpec]:
    """A job that sleeps; whatever is left of it goes at the end."""
    folder = tmp_path / "it's a job"
    name = f"contract-{uuid.uuid4().hex[:8]}"
    if request.param == "slurm":
        request.getfixturevalue("slurm_conf")
    where = facility(request.param, tmp_path, monkeypatch)
    spec = JobSpec(name, folder, where, fake_worker.sleep, (str(tmp_path / "out"),))
    yield spec
    left = make_scheduler(where).find(spec)
    if left is not None:
        make_scheduler(where).cancel(left)


@pytest.fixture
def scheduler(spec: JobSpec) -> Scheduler:
    return make_scheduler(spec.facility)


def info(scheduler: Scheduler, job: dict[str, Any]) -> JobInfo:
    """Return the answer about one job."""
    return scheduler.infos([job])[job["name"]]


def started(spec: JobSpec) -> None:
    until(lambda: len(list(Path(spec.args[0]).glob("env-*.json"))) == 2)


def test_a_job_from_begin_to_end(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects the whole life of a job: all ranks run, and the end is noticed."""
    spec = dataclasses.replace(spec, function=fake_worker.dump_environment)
    began_s = time.monotonic()
    job = scheduler.submit(spec)
    assert json.loads(json.dumps(job)) == job
    assert (job["name"], job["folder"]) == (spec.name, str(spec.folder))
    started(spec)
    until(lambda: info(scheduler, job).state == "ended")
    end = info(scheduler, job)
    assert end.queue_s is not None
    longest_s = time.monotonic() - began_s + 1  # Slurm cuts seconds
    assert 0 <= end.queue_s < longest_s
    assert (end.nodes, end.restarts, end.outcome) == (1, 0, "completed")
    assert end.ended_s is not None
    assert -1 < end.ended_s - (end.started_s or 0.0) < longest_s
    assert not processes_of(spec.name)


def test_environment_of_the_ranks(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects what the worker relies on: threads, walltime, start, name, imports."""
    spec.facility.env["GREETING"] = "it's $HOME"
    spec = dataclasses.replace(spec, function=fake_worker.dump_environment)
    began_s = time.monotonic()
    scheduler.submit(spec)
    started(spec)
    env = json.loads((Path(spec.args[0]) / "env-1.json").read_text())
    assert env["GREETING"] == "it's $HOME"
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["FLWR_HPC_JOB"] == spec.name
    assert env["FLWR_HPC_WALLTIME_S"] in ("600", "3600")
    assert began_s - 1 < float(env["FLWR_HPC_T0"]) < time.monotonic()
    if end_s := env.get("FLWR_HPC_END_S"):  # where the scheduler tells the job
        assert 0 < float(end_s) - time.time() <= 3600


def test_another_process_finds_the_job(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects re-attachment: by what `submit` returned, and by the name alone."""
    assert scheduler.find(spec) is None
    job = scheduler.submit(spec)
    other = make_scheduler(spec.facility)
    assert until(lambda: info(other, job).state == "running")
    found = until(lambda: other.find(spec))  # while it execs, a process has no environment
    assert found["id"] == job["id"]
    assert other.find(dataclasses.replace(spec, name=spec.name + "x")) is None


def test_same_id_with_another_name_is_not_ours(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects other people's jobs when an id is used again."""
    job = scheduler.submit(spec)
    started(spec)
    other = job | {"name": "not-" + spec.name, "submitted_s": time.time() - 3600}
    assert info(scheduler, other).state == "ended"
    scheduler.cancel(other)
    assert info(scheduler, job).state == "running"


def test_cancel_leaves_no_process(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects Ctrl-C; cancelling once more is harmless."""
    job = scheduler.submit(spec)
    started(spec)
    assert processes_of(spec.name)
    scheduler.cancel(job)
    until(lambda: not processes_of(spec.name))
    until(lambda: info(scheduler, job).state == "ended")
    assert info(scheduler, job).outcome == "cancelled"
    scheduler.cancel(job)


def test_a_failed_rank_ends_the_job(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects against a job that holds its nodes while half of it is dead."""
    spec = dataclasses.replace(spec, function=fake_worker.fail_on_rank_1)
    job = scheduler.submit(spec)
    until(lambda: info(scheduler, job).state == "ended")
    assert info(scheduler, job).outcome == "failed"
    assert "rank 1 has had enough" in stderr_tail(job)
    until(lambda: not processes_of(spec.name))


def test_script_is_what_runs(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects dry runs: the script shown is the one submitted."""
    shown = scheduler.script(spec)
    assert not spec.folder.exists()
    scheduler.submit(spec)
    assert shown in [p.read_text() for p in spec.folder.glob("*submission.sh")]


def test_many_jobs_in_one_answer(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects the batch system from a request for every job."""
    ended = dataclasses.replace(
        spec,
        name=spec.name + "-b",
        folder=spec.folder / "b",
        function=fake_worker.dump_environment,
        args=(str(spec.folder / "out"),),
    )
    jobs = [scheduler.submit(spec), scheduler.submit(ended)]
    started(spec)
    stranger = jobs[0] | {"name": "stranger", "id": "999999", "submitted_s": time.time() - 3600}
    until(lambda: info(scheduler, jobs[1]).state == "ended")
    said = scheduler.infos([*jobs, stranger])
    states = [said[name].state for name in (spec.name, ended.name, "stranger")]
    assert states == ["running", "ended", "ended"]
    assert scheduler.infos([]) == {}


def test_estimate_submits_nothing(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects forecasts: the scheduler's plan, and no job."""
    wait_s = scheduler.estimate(spec)
    assert (wait_s is not None) == rules_of(spec.facility).trial
    assert 0 <= (wait_s or 0.0) < 120
    assert scheduler.find(spec) is None
    assert not spec.folder.exists()


@pytest.mark.parametrize(
    ("kind", "flag"),
    [("fake_slurm", "fake/down"), ("fake_pbs", "fake/down"), ("dummy", "dummy/away")],
)
def test_no_answer_is_unknown(
    kind: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a running job while its server is away: not ended, not found, not cancelled."""
    where = facility(kind, tmp_path, monkeypatch)
    scheduler = make_scheduler(where)
    assert isinstance(scheduler, CommandScheduler)
    scheduler.pauses_s = ()
    name = f"contract-{uuid.uuid4().hex[:8]}"
    spec = JobSpec(name, tmp_path / "job", where, fake_worker.sleep, (str(tmp_path / "out"),))
    job = scheduler.submit(spec)
    started(spec)
    (tmp_path / flag).touch()
    assert info(scheduler, job).state == "unknown"
    for request in (scheduler.find, scheduler.submit):
        with pytest.raises(SchedulerUnavailableError):
            request(spec)
    with pytest.raises(SchedulerUnavailableError):
        scheduler.cancel(job)
    (tmp_path / flag).unlink()
    assert info(scheduler, job).state == "running"
    scheduler.cancel(job)
    until(lambda: not processes_of(name))


def test_job_whose_submission_was_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a job that was taken all the same: no refusal, found by its name, and it works."""
    where = facility("fake_slurm", tmp_path, monkeypatch)
    scheduler = make_scheduler(where)
    name = f"contract-{uuid.uuid4().hex[:8]}"
    spec = JobSpec(name, tmp_path / "job", where, fake_worker.sleep, (str(tmp_path / "out"),))
    (tmp_path / "fake/reset").touch()
    with pytest.raises(SchedulerUnavailableError, match="Connection reset"):
        scheduler.submit(spec)
    job = scheduler.find(spec)
    assert job is not None
    started(spec)
    scheduler.cancel(job)
    until(lambda: not processes_of(name))


def test_only_other_jobs_of_the_name_are_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the job that is kept, and all others, where a request was taken late."""
    where = facility("fake_slurm", tmp_path, monkeypatch)
    scheduler = make_scheduler(where)
    name = f"contract-{uuid.uuid4().hex[:8]}"

    def submit(name: str, folder: str) -> dict[str, Any]:
        args = (str(tmp_path / folder / "out"),)
        spec = JobSpec(name, tmp_path / folder, where, fake_worker.sleep, args)
        job = scheduler.submit(spec)
        started(spec)
        return job

    late, kept, other = submit(name, "a"), submit(name, "b"), submit(f"{name}-2", "c")
    for _ in range(2):
        scheduler.cancel_named(name, but=kept["id"])
    states = [info(scheduler, job).state for job in (late, kept, other)]
    assert states == ["ended", "running", "running"]
    scheduler.cancel_named(name)
    scheduler.cancel(other)
    until(lambda: not processes_of(name) and not processes_of(f"{name}-2"))


def test_refusal_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user from a retry loop over a wrong partition."""
    where = facility("fake_slurm", tmp_path, monkeypatch)
    where.partition = "refused"
    spec = JobSpec("n", tmp_path / "job", where, fake_worker.sleep, ("x",))
    with pytest.raises(UserError, match="invalid partition"):
        make_scheduler(where).submit(spec)
    with pytest.raises(UserError, match="invalid partition"):
        make_scheduler(where).estimate(spec)
