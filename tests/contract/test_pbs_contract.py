"""PBS beyond the contract of all schedulers: its faults, on executables that run the job."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import worker as fake_worker
from worlds.jobs import facility, processes_of, until

from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import JobInfo, JobSpec, NotYetError, SchedulerUnavailableError
from flwr_hpc.schedulers.pbs.adapter import PbsScheduler


class Server:
    """The fake server, and one job of two ranks on it."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        where = facility("fake_pbs", tmp_path, monkeypatch)
        self.home, self.out = Path(os.environ["FAKE_PBS"]), tmp_path / "out"
        (self.home / "kill_delay").write_text("0.2")
        name = f"pbs-{uuid.uuid4().hex[:8]}"
        self.spec = JobSpec(name, tmp_path / "a job", where, fake_worker.sleep, (str(self.out),))
        self.scheduler = PbsScheduler(where)
        self.scheduler.pauses_s = ()
        self.job: dict[str, Any] = {}

    def submit(self, function: Callable[..., Any] = fake_worker.sleep, **fields: Any) -> None:
        where = dataclasses.replace(self.spec.facility, **fields)
        spec = dataclasses.replace(self.spec, facility=where, function=function)
        self.job = self.scheduler.submit(spec)

    def started(self) -> None:
        until(lambda: len(list(self.out.glob("env-*.json"))) == 2)

    def do(self, word: str) -> None:
        """What an operator, or fate, does to the job."""
        (self.home / f"{self.job['id'].split('.')[0]}.do").write_text(word)

    def info(self) -> JobInfo:
        return self.scheduler.infos([self.job])[self.spec.name]

    def until(self, state: str) -> JobInfo:
        until(lambda: self.info().state == state)
        return self.info()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path, monkeypatch)
    yield server
    for flag in ("down", "no_history", "refuse"):
        (server.home / flag).unlink(missing_ok=True)
    if server.job:
        server.scheduler.cancel(server.job)
        until(lambda: server.info().state == "ended")
    until(lambda: not processes_of(server.spec.name))


def test_server_down(server: Server) -> None:
    """Protects a running job: JSON without jobs is no end, and a request not taken is told."""
    server.submit()
    server.started()
    (server.home / "down").touch()
    assert server.info().state == "unknown"
    for request in (server.scheduler.cancel, lambda _: server.scheduler.find(server.spec)):
        with pytest.raises(SchedulerUnavailableError):
            request(server.job)
    with pytest.raises(SchedulerUnavailableError):
        server.scheduler.submit(dataclasses.replace(server.spec, folder=server.out / "b"))
    (server.home / "down").unlink()
    assert server.info().state == "running"


def test_walltime(server: Server) -> None:
    """Protects the name of that end: SIGTERM, SIGKILL, Exit_status -29."""
    server.submit(walltime="00:00:02")
    info = server.until("ended")
    assert info.outcome == "timeout"
    assert "exceeded resource walltime" in info.reason
    assert not processes_of(server.spec.name)


def test_put_back_in_the_queue(server: Server) -> None:
    """Protects a requeued job: same id, another attempt, output appended."""
    server.submit()
    server.started()
    first = [json.loads(p.read_text())["FLWR_HPC_ATTEMPT"] for p in server.out.glob("env-*")]
    assert len(set(first)) == 1
    for file in server.out.glob("env-*"):
        file.unlink()
    server.do("nodefail")
    server.started()
    info = server.info()
    assert (info.state, info.restarts, info.id) == ("running", 1, server.job["id"])
    second = json.loads((server.out / "env-0.json").read_text())["FLWR_HPC_ATTEMPT"]
    assert second not in first
    log = (server.spec.folder / f"{info.id}_1_log.out").read_text()
    assert log.count("Loading pickle") == 2


def test_held_and_deleted_in_the_queue(server: Server) -> None:
    """Protects the user from waiting for a job that somebody holds; it never started."""
    plan = time.time() + 3600
    (server.home / "full").write_text(str(plan))
    server.submit()
    info = server.until("pending")
    until(lambda: "Not Running" in server.info().reason)
    assert (info.stuck, info.started_s) == ("", None)
    assert info.expected_start_s == pytest.approx(plan, abs=1)
    server.do("hold")
    until(lambda: server.info().stuck == "held")
    server.scheduler.cancel(server.job)
    info = server.until("ended")
    assert (info.outcome, info.started_s) == ("cancelled", None)


def test_absurd_request_is_seen(server: Server) -> None:
    """Protects the user from waiting for ever: PBS takes such a job and never runs it."""
    server.submit(chunk="ncpus=4096")
    until(lambda: server.info().stuck == "impossible")
    assert "Can Never Run" in server.info().reason


def test_suspended_and_resumed(server: Server) -> None:
    """Protects a job that makes room for another and comes back."""
    server.submit()
    server.started()
    server.do("suspend")
    until(lambda: "suspended" in server.info().reason)
    assert server.info().state == "running"
    server.do("resume")
    until(lambda: "running" in server.info().reason)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"partition": "refused"}, "Unknown queue"),
        ({"options": {"filesystem": "home"}}, "Unknown resource Resource_List.filesystem"),
        ({"walltime": "1001:00:00"}, "violates queue"),
    ],
)
def test_refusals_say_why(fields: dict[str, Any], said: str, server: Server) -> None:
    """Protects the user from a retry loop over a mistake."""
    with pytest.raises(UserError, match=said):
        server.submit(**fields)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (38, "would exceed queue workq's per-user limit"),
        (39, "limit on resource ncpus in queue workq"),
        (173, "Queue is not enabled"),
        (196, "Resource temporarily unavailable"),
        (198, "Maximum number of jobs already in queue workq"),
    ],
)
def test_refusals_that_pass(code: int, said: str, server: Server) -> None:
    """Protects the run from a limit that is full now: there is no job, and one may be later."""
    (server.home / "refuse").write_text(str(code))
    with pytest.raises(NotYetError, match=said):
        server.submit()
    assert server.scheduler.find(server.spec) is None
    (server.home / "refuse").unlink()
    server.submit()


def test_queue_of_one_job_per_user(server: Server) -> None:
    """Protects the successor of an allocation: the slot is free as soon as the first has ended."""
    (server.home / "max_queued").write_text("1")
    server.submit()
    second = dataclasses.replace(server.spec, name=f"{server.spec.name}-b", folder=server.out / "b")
    with pytest.raises(NotYetError, match="per-user limit"):
        server.scheduler.submit(second)
    server.scheduler.cancel(server.job)
    server.until("ended")
    job = server.scheduler.submit(second)
    assert job["id"] != server.job["id"]
    server.scheduler.cancel(job)


def test_running_job_of_a_server_without_history(server: Server) -> None:
    """Protects a running job: asked with -x such a server prints no job, and exits with 0."""
    (server.home / "no_history").touch()
    server.submit()
    server.started()
    server.job |= {"submitted_s": time.time() - 3600}  # long past any doubt
    assert server.info().state == "running"
    found = server.scheduler.find(server.spec)
    assert found is not None
    assert found["id"] == server.job["id"]
    server.scheduler.cancel(server.job)
    assert server.until("ended").outcome is None


def test_fast_rerun(server: Server) -> None:
    """Protects the hours of a run that was put back and began again between two looks."""
    server.submit()
    server.started()
    first = server.info()
    for file in server.out.glob("env-*"):
        file.unlink()
    server.do("rerun")
    server.started()
    again = server.info()
    assert (again.state, again.restarts) == ("running", 1)
    assert again.reason.startswith("running, put back in the queue (Exit_status -11)")
    assert first.started_s <= again.submitted_s <= again.started_s  # type: ignore[operator]


def test_mpich_that_knows_nothing_of_pbs(server: Server) -> None:
    """Protects Debian's MPICH: its launcher is pbs_tmrsh, which undoes no quotes."""
    server.submit(fake_worker.dump_environment, mpi="mpich-tmrsh")
    assert server.until("ended").outcome == "completed"
    env = json.loads((server.out / "env-1.json").read_text())
    assert (env["SUBMITIT_LOCAL_GLOBALID"], env["PMI_SIZE"]) == ("1", "2")


def test_server_without_history(server: Server) -> None:
    """Protects sites whose server forgets finished jobs: the end is seen, not how it was."""
    (server.home / "no_history").touch()
    server.submit(fake_worker.dump_environment)
    server.job |= {"submitted_s": time.time() - 3600}
    info = server.until("ended")
    assert (info.outcome, info.reason) == (None, "PBS does not know the job any more")
    assert server.scheduler.find(server.spec) is None


def test_open_mpi_and_its_ranks(server: Server) -> None:
    """Protects the second family of launchers, end to end."""
    server.submit(fake_worker.dump_environment, mpi="openmpi")
    assert server.until("ended").outcome == "completed"
    env = json.loads((server.out / "env-1.json").read_text())
    assert (env["SUBMITIT_LOCAL_GLOBALID"], env["OMPI_COMM_WORLD_SIZE"]) == ("1", "2")


def test_failure_before_the_ranks_is_in_the_log(server: Server) -> None:
    """Protects the cause of a job that ends at once, say a module that is not there."""
    server.submit(setup=["echo 'no such module' >&2; exit 3"])
    info = server.until("ended")
    assert info.outcome == "failed"
    assert "Exit_status 3" in info.reason
    log = server.spec.folder / f"{info.id}_0_log.err"
    assert log.read_text() == "no such module\n"
