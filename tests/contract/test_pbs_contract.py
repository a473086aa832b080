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
from flwr_hpc.schedulers.base import JobInfo, JobSpec, SchedulerUnavailableError
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
    for flag in ("down", "no_history"):
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
