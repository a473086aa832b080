"""What every scheduler adapter must do; local, fake Slurm executables, and a real cluster."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fake_worker
import pytest
from job_tools import facility, processes_of, until

from flwr_hpc.errors import UserError
from flwr_hpc.jobs.scheduler import JobSpec, Scheduler, make_scheduler, stderr_tail

KINDS = ["local", "fake_slurm", pytest.param("slurm", marks=pytest.mark.slurm)]


@pytest.fixture(params=KINDS)
def spec(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[JobSpec]:
    """A job that sleeps; whatever is left of it goes at the end."""
    folder = tmp_path / "it's a job"
    name = f"contract-{uuid.uuid4().hex[:8]}"
    where = facility(request.param, tmp_path, monkeypatch)
    spec = JobSpec(name, folder, where, fake_worker.sleep, (str(tmp_path / "out"),))
    yield spec
    left = make_scheduler(where).find(spec)
    if left is not None:
        make_scheduler(where).cancel(left)


@pytest.fixture
def scheduler(spec: JobSpec) -> Scheduler:
    return make_scheduler(spec.facility)


def started(spec: JobSpec) -> None:
    until(lambda: len(list(Path(spec.args[0]).glob("env-*.json"))) == 2)


def test_a_job_from_begin_to_end(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects the whole life of a job: all ranks run, and the end is noticed."""
    spec = dataclasses.replace(spec, function=fake_worker.dump_environment)
    job = scheduler.submit(spec)
    assert json.loads(json.dumps(job)) == job
    assert (job["name"], job["folder"]) == (spec.name, str(spec.folder))
    started(spec)
    until(lambda: scheduler.info(job).state == "ended")
    info = scheduler.info(job)
    assert info.queue_s is not None
    assert 0 <= info.queue_s < 30
    assert not processes_of(spec.name)


def test_environment_of_the_ranks(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects what the worker relies on: threads, walltime, start, name, imports."""
    spec.facility.env["GREETING"] = "it's $HOME"
    spec = dataclasses.replace(spec, function=fake_worker.dump_environment)
    scheduler.submit(spec)
    started(spec)
    env = json.loads((Path(spec.args[0]) / "env-1.json").read_text())
    assert env["GREETING"] == "it's $HOME"
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["FLWR_HPC_JOB"] == spec.name
    assert env["FLWR_HPC_WALLTIME_S"] in ("600", "3600")
    assert 0 < time.monotonic() - float(env["FLWR_HPC_T0"]) < 60


def test_another_process_finds_the_job(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects re-attachment: by what `submit` returned, and by the name alone."""
    assert scheduler.find(spec) is None
    job = scheduler.submit(spec)
    other = make_scheduler(spec.facility)
    assert until(lambda: other.info(job).state == "running")
    found = other.find(spec)
    assert found is not None
    assert found["id"] == job["id"]
    assert other.find(dataclasses.replace(spec, name=spec.name + "x")) is None


def test_same_id_with_another_name_is_not_ours(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects other people's jobs when an id is used again."""
    job = scheduler.submit(spec)
    started(spec)
    other = job | {"name": "not-" + spec.name, "submitted_s": time.time() - 3600}
    assert scheduler.info(other).state == "ended"
    scheduler.cancel(other)
    assert scheduler.info(job).state == "running"


def test_cancel_leaves_no_process(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects Ctrl-C; cancelling once more is harmless."""
    job = scheduler.submit(spec)
    started(spec)
    assert processes_of(spec.name)
    scheduler.cancel(job)
    until(lambda: not processes_of(spec.name))
    until(lambda: scheduler.info(job).state == "ended")
    scheduler.cancel(job)


def test_a_failed_rank_ends_the_job(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects against a job that holds its nodes while half of it is dead."""
    spec = dataclasses.replace(spec, function=fake_worker.fail_on_rank_1)
    job = scheduler.submit(spec)
    until(lambda: scheduler.info(job).state == "ended")
    assert "rank 1 has had enough" in stderr_tail(job)
    until(lambda: not processes_of(spec.name))


def test_script_is_what_runs(spec: JobSpec, scheduler: Scheduler) -> None:
    """Protects dry runs: the script shown is the one submitted."""
    shown = scheduler.script(spec)
    assert not spec.folder.exists()
    scheduler.submit(spec)
    assert shown in [p.read_text() for p in spec.folder.glob("*submission.sh")]


def test_no_answer_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a running job while slurmctld is away."""
    where = facility("fake_slurm", tmp_path, monkeypatch)
    scheduler = make_scheduler(where)
    name = f"contract-{uuid.uuid4().hex[:8]}"
    spec = JobSpec(name, tmp_path / "job", where, fake_worker.sleep, (str(tmp_path / "out"),))
    job = scheduler.submit(spec)
    started(spec)
    (Path(os.environ["FAKE_SLURM"]) / "down").touch()
    assert scheduler.info(job).state == "unknown"
    (Path(os.environ["FAKE_SLURM"]) / "down").unlink()
    assert scheduler.info(job).state == "running"
    scheduler.cancel(job)
    until(lambda: not processes_of(name))


def test_refusal_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user from a retry loop over a wrong partition."""
    where = facility("fake_slurm", tmp_path, monkeypatch)
    where.partition = "refused"
    spec = JobSpec("n", tmp_path / "job", where, fake_worker.sleep, ("x",))
    with pytest.raises(UserError, match="invalid partition"):
        make_scheduler(where).submit(spec)
