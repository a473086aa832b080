"""Points that share jobs: how many have room, which node takes which, and job after job."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from worlds.clock import FakeClock

from flwr_hpc import run
from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.schema import LimitsConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import JobInfo, JobSpec, SchedulerUnavailableError
from flwr_hpc.sweep.drive import command
from flwr_hpc.sweep.folder import SweepDir
from flwr_hpc.sweep.job_node import take
from flwr_hpc.sweep.room import Room, room_for
from flwr_hpc.sweep.shared_jobs import SharedJobs

LEONARDO = ["+facility=leonardo", "facilities.leonardo.account=p"]


def _room(*overrides: str, ranks: int = 1) -> Room:
    return room_for([compose_config([*LEONARDO, *overrides])], ranks)


@dataclass
class Queue:
    """A batch system whose jobs run at their second look; what they come to is the test's."""

    folder: SweepDir
    ends: list[dict[str, int]]  # By job: the codes of the points that end in it
    poll_s: float = 60.0
    specs: list[JobSpec] = field(default_factory=list)
    looks: dict[str, int] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    unanswered: int = 0  # Submissions that are taken, and not answered
    on_run: Callable[[], object] = lambda: None

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        assert spec.name not in [s.name for s in self.specs], "submitted twice"
        self.specs.append(spec)
        if self.unanswered:
            self.unanswered -= 1
            raise SchedulerUnavailableError("no answer")
        return self._job(spec)

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        return next((self._job(s) for s in self.specs if s.name == spec.name), None)

    def infos(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobInfo]:
        (job,) = jobs
        look = self.looks[job["name"]] = self.looks.get(job["name"], 0) + 1
        if look == 1:
            return {job["name"]: JobInfo(job["id"], job["name"], "pending", reason="Priority")}
        if look == 2:
            self._run(int(job["id"]))
            return {job["name"]: JobInfo(job["id"], job["name"], "running")}
        outcome = "cancelled" if job["id"] in self.cancelled else "completed"
        info = JobInfo(job["id"], job["name"], "ended", outcome=outcome)  # type: ignore[arg-type]
        return {job["name"]: info}

    def cancel(self, job: dict[str, Any]) -> None:
        self.cancelled.append(job["id"])

    def _run(self, number: int) -> None:
        names = self.specs[number].args[2]
        taken = self.specs[number].folder / "taken-1"
        points = [p for p in self.folder.points() if p.name in names]
        codes = self.ends[number]
        for point in take(points, taken):
            if point.name in codes:
                self.folder.end(point, codes[point.name], "out of memory" * codes[point.name])
        self.on_run()

    def _job(self, spec: JobSpec) -> dict[str, Any]:
        number = [s.name for s in self.specs].index(spec.name)
        return {"id": str(number), "name": spec.name, "folder": str(spec.folder)}


@dataclass
class World:
    """A sweep, its batch system, and what was said."""

    folder: SweepDir
    queue: Queue
    said: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    room: Room = field(default_factory=_room)

    def run(self) -> int:
        points = [p for p in self.folder.points() if p.code is None]
        return SharedJobs(
            self.folder, self.room, self.queue,  # type: ignore[arg-type]
            lambda what, point: self.said.append(f"{point.name} {what}"), self.told.append,
            FakeClock(),
        ).run(points)  # fmt: skip

    def codes(self) -> list[int | None]:
        return [point.code for point in self.folder.points()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    folder = SweepDir(tmp_path / "a sweep")
    folder.add([[f"seed={i}"] for i in range(3)], None, 1)
    return World(folder, Queue(folder, []))


def test_a_job_holds_as_many_points_as_its_ranks_have_room_for() -> None:
    """Protects what is asked for: one process per node that has all of it, points' shares of it."""
    room = _room("facilities.leonardo.nodes=2", "facilities.leonardo.cpus_per_rank=6", ranks=2)
    job = room.job
    assert (job.nodes, job.ranks_per_node, job.gpus_per_node, job.cpus_per_rank) == (2, 1, 4, 24)
    assert (room.per_node, room.gpus) == (2, 2)
    assert "4 at a time on 2 nodes, 2 of a node's ranks each; at most 1.00 node-hours" in str(room)
    assert _room(ranks=3).per_node == 1


def test_a_point_trains_on_its_part_of_a_node() -> None:
    """Protects points in a job: their settings hold, also at a queue that takes many nodes only."""
    large = ["qos=boost_qos_bprod", "nodes=65", "setup=[module load x]", "container=/i.sif"]
    overrides = [f"facilities.leonardo.{one}" for one in large]
    config = compose_config([*LEONARDO, *overrides, *_room(*overrides).changes])
    here = config.facilities["leonardo"]
    assert (here.local, here.nodes, here.ranks_per_node, here.gpus_per_node) == (True, 1, 1, 1)
    assert (here.cpus_per_rank, here.setup, here.container) == (8, [], None)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([LEONARDO, [*LEONARDO, "facilities.leonardo.nodes=2"]], "facilities differ"),
        ([["seed=1"]], "here at 2 (local_a, local_b)"),
        ([["+facility=local_a"]], "sweep.parallel in place of"),
        ([[*LEONARDO, "facilities.leonardo.ssh=host"]], "reached by ssh"),
        ([[*LEONARDO, "facilities.leonardo.ranks_per_node=1"]], "has 1 ranks on a node"),
    ],
)
def test_points_that_cannot_share_a_job_are_refused(points: list[list[str]], message: str) -> None:
    """Protects a sweep from jobs that some of its points do not fit."""
    configs = [compose_config(point) for point in points]
    with pytest.raises(UserError) as error:
        room_for(configs, 2)
    assert message in str(error.value)


def test_the_command_shows_a_shared_job_and_refuses_what_contradicts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects an account's budget, and a sweep's points from being run in two ways."""
    args = ["-m", "seed=1,2", *LEONARDO, "sweep.ranks_per_point=2", "dry_run=true"]
    assert run.main(args) == 0
    assert "2 at a time on 1 node" in capsys.readouterr().out
    assert run.main([*args, "sweep.parallel=2"]) == 2
    assert "give it more nodes" in capsys.readouterr().err
    folder = SweepDir(tmp_path / "s")
    folder.add([["seed=1", *LEONARDO], ["seed=2", *LEONARDO]], None)
    assert run.main([*args, f"sweep.dir={folder.path}"]) == 2
    assert "began with jobs for each point" in capsys.readouterr().err


def test_nodes_share_the_points(world: World, tmp_path: Path) -> None:
    """Protects points from two nodes: each is one's alone, and the next free node's."""
    points = world.folder.points()
    a, b = take(points, tmp_path / "taken"), take(points, tmp_path / "taken")
    assert [next(one).name for one in (a, b, b)] == ["000", "001", "002"]
    assert next(a, None) is None
    assert next(take(points, tmp_path / "taken-again")).name == "000"


def test_a_point_in_a_job_is_told_so_each_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a point that goes on from submitting jobs from within a job."""
    started: list[list[str]] = []
    monkeypatch.setattr(
        "flwr_hpc.sweep.drive.subprocess.Popen", lambda words, **_: started.append(words)
    )
    point = world.folder.points()[0]
    command(world.folder, changes=world.room.changes)(point, 0)
    (world.folder.run_dir(point) / "run.json").touch()
    command(world.folder, changes=world.room.changes)(point, 0)
    assert all("facilities.leonardo.scheduler=local" in words for words in started)
    assert f"resume={world.folder.run_dir(point)}" in started[1]


def test_jobs_follow_until_every_point_has_ended(world: World) -> None:
    """Protects a sweep longer than a walltime; a failed point is a point."""
    world.queue.ends = [{"000": 0, "001": 2}, {"002": 0}]
    assert world.run() == 0
    assert world.codes() == [0, 2, 0]
    assert [spec.args[2] for spec in world.queue.specs] == [["000", "001", "002"], ["002"]]
    assert world.said == [
        *("000 finished", "001 failed", "002 started", "002 interrupted"),
        "002 finished",
    ]


def test_a_job_without_an_ended_point_is_the_last(world: World) -> None:
    """Protects node-hours from job after job that brings nothing."""
    world.queue.ends = [{}]
    assert world.run() == 0
    assert world.codes() == [None] * 3
    assert "no point has ended in this job" in world.told[-1]


def test_a_killed_commands_job_is_waited_for(world: World) -> None:
    """Protects points from a second job while the first one still runs."""
    world.queue.ends = [{"000": 0, "001": 0, "002": 0}]
    job = JobSpec(
        f"sweep-{world.folder.token}-000", world.folder.jobs / "000", world.room.job, print,
        args=("", "", ["000", "001", "002"]),
    )  # fmt: skip
    job.folder.mkdir(parents=True)
    world.queue.submit(job)
    assert world.run() == 0
    assert world.codes() == [0, 0, 0]
    assert len(world.queue.specs) == 1


def test_a_submission_without_an_answer_is_not_repeated(world: World) -> None:
    """Protects from two jobs that work on the same points."""
    world.queue.ends, world.queue.unanswered = [{"000": 0, "001": 0, "002": 0}], 1
    assert world.run() == 0
    assert world.codes() == [0, 0, 0]
    assert any("no answer; asking again" in line for line in world.told)


def test_an_interruption_cancels_the_job(world: World) -> None:
    """Protects Ctrl-C: the job ends, no other follows, and the points are to go on."""
    world.queue.ends = [{"000": 0}]
    world.queue.on_run = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert world.run() == signal.SIGINT
    assert world.queue.cancelled == ["0"]
    assert world.codes() == [0, None, None]
    assert len(world.queue.specs) == 1


def test_a_second_interruption_waits_for_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects people from a batch system that is away: the command ends, the job is known."""

    def away(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise SchedulerUnavailableError("no answer")

    world.queue.ends = [{}]
    world.queue.on_run = lambda: os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(world.queue, "cancel", away)
    assert world.run() == signal.SIGINT
    assert world.told[-1] == "left without waiting for the end of job 0: resume= does"


def test_jobs_keep_to_a_limit_of_node_hours(world: World) -> None:
    """Protects an account: what all jobs may take counts, not that of each point."""
    world.room = replace(world.room, limits=LimitsConfig(node_hours=0.75))  # a job may take 0.5
    world.queue.ends = [{"000": 0}, {"001": 0}]
    with pytest.raises(UserError, match=r"site\.limits\.node_hours=0\.75"):
        world.run()
    assert world.codes() == [0, None, None]
