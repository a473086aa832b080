"""The life of the probe job, with a scheduler and a clock that obey the test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds.clock import FakeClock
from worlds.site.doctor import FakeScheduler

from flwr_hpc.config.facility import FacilityConfig, QueueConfig
from flwr_hpc.doctor.job import Probe, probe_facility
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import JobInfo, SchedulerUnavailableError

FACILITY = FacilityConfig(account=None, ranks_per_node=2, walltime="00:10:00")


class FacilityExam:
    """A probe with its surroundings."""

    def __init__(self, tmp_path: Path, **scheduler: Any) -> None:
        self.clock, self.scheduler = FakeClock(1000.0), FakeScheduler(**scheduler)
        self.root = tmp_path / "runs" / "doctor"
        self.probe = Probe("x", FACILITY, self.root, self.scheduler, self.clock, 1800.0)

    def wait(self) -> None:
        """Poll to the end, as the command does."""
        while not self.probe.poll():
            self.clock.sleep(1.0)

    def tell(self, what: str, rank: int, **said: Any) -> None:
        (self.root / "probe" / f"{what}-{rank}.json").write_text(json.dumps(said))

    def ended(self, reason: str) -> None:
        self.scheduler.info = JobInfo("7", self.probe.spec.name, "ended", reason=reason)


def test_a_probe_from_begin_to_end(tmp_path: Path) -> None:
    """Protects the exchange of files, the bounds on the clock, and that nothing is left."""
    patient = FacilityExam(tmp_path)
    patient.probe.start()
    assert not patient.probe.poll()
    patient.clock.sleep(60.0)
    for rank in (0, 1):
        patient.tell("hello", rank, wall=patient.clock.wall() + 7.0 - 0.5)
    assert not patient.probe.poll()
    patient.clock.sleep(0.4)
    for rank in (0, 1):
        assert (patient.root / "probe" / f"ping-{rank}.json").exists()
        patient.tell("pong", rank, wall=patient.clock.wall() + 7.0 - 0.2)
        patient.tell("report", rank, host="n")
    assert patient.probe.poll()
    patient.probe.close()
    found = patient.probe.result
    assert found.waited_s == pytest.approx(60.0)
    assert found.round_trip_s[1] == pytest.approx(0.4)
    low, high = found.clock_s[0]
    assert low <= 7.0 <= high
    assert high - low < 0.6
    assert found.reports == {0: {"host": "n"}, 1: {"host": "n"}}
    assert patient.scheduler.cancelled == ["7"]
    assert not list(tmp_path.iterdir())


def test_polling_is_sparse(tmp_path: Path) -> None:
    """Protects login nodes: two questions a minute at most, however long the queue."""
    patient = FacilityExam(tmp_path)
    patient.probe.start()
    patient.wait()
    assert patient.clock.now() - 1000.0 == pytest.approx(1800.0, abs=2)
    assert patient.scheduler.asked <= 61
    said = "no sign of life after 30 min; the scheduler says: PENDING (Priority)"
    assert patient.probe.result.fault == said
    patient.probe.close()
    assert patient.scheduler.cancelled == ["7"]


def test_a_job_that_cannot_start_is_not_waited_for(tmp_path: Path) -> None:
    """Protects from half an hour of waiting for a job that is held."""
    patient = FacilityExam(
        tmp_path, info=JobInfo("7", "", "pending", stuck="held", reason="held: bad")
    )
    patient.probe.start()
    patient.wait()
    assert patient.clock.now() < 1010.0
    assert patient.probe.result.fault == "the job will not start: held: bad"


@pytest.mark.parametrize(("log", "waits_s"), [("", 30.0), ("No module named 'x'\n", 5.0)])
def test_a_job_that_ends_early(tmp_path: Path, log: str, waits_s: float) -> None:
    """Protects slow file systems: the last words are waited for, where there are none yet."""

    def write(spec: Any) -> None:
        spec.folder.mkdir(parents=True)
        (spec.folder / "7_0_log.err").write_text(log)

    patient = FacilityExam(tmp_path, on_submit=write)
    patient.probe.start()
    patient.ended("FAILED")
    patient.wait()
    assert patient.clock.now() == pytest.approx(1005.0 + waits_s, abs=3)
    assert patient.probe.result.fault == "the job ended early: FAILED"
    assert patient.probe.result.log == log.strip()


def test_a_rank_that_hangs(tmp_path: Path) -> None:
    """Protects from waiting for ever for a rank that hangs in an import."""
    patient = FacilityExam(tmp_path)
    patient.probe.start()
    patient.tell("hello", 0, wall=0.0)
    patient.wait()
    assert patient.clock.now() < 1500.0
    assert "some ranks did not come to an end" in patient.probe.result.fault


def test_a_refusal(tmp_path: Path) -> None:
    """Protects the scheduler's words; nothing is waited for or left."""
    patient = FacilityExam(tmp_path, error=UserError("refused: no such account\nCheck account"))
    patient.probe.start()
    patient.wait()
    patient.probe.close()
    assert patient.probe.result.fault == "refused: no such account"
    assert not list(tmp_path.iterdir())


def test_interrupted_while_submitting(tmp_path: Path) -> None:
    """Protects from a job nobody knows of: it is found by its name and cancelled."""

    def interrupt(spec: Any) -> None:
        raise KeyboardInterrupt

    patient = FacilityExam(tmp_path, on_submit=interrupt)
    with pytest.raises(KeyboardInterrupt):
        patient.probe.start()
    patient.probe.close()
    assert patient.scheduler.cancelled == ["7"]


def test_no_answer_to_the_submission(tmp_path: Path) -> None:
    """Protects from a job that was taken although sbatch timed out."""
    patient = FacilityExam(tmp_path)

    def taken(spec: Any) -> None:
        raise SchedulerUnavailableError("sbatch: timed out")

    patient.scheduler.on_submit = taken
    patient.probe.start()
    assert patient.probe.poll()
    patient.probe.close()
    assert patient.scheduler.cancelled == ["7"]


def test_a_scheduler_that_does_not_cancel(tmp_path: Path) -> None:
    """Protects the user's budget: what may be left is named."""
    patient = FacilityExam(tmp_path, deaf=True)
    patient.probe.start()
    patient.probe.close()
    assert patient.probe.spec.name in patient.probe.left
    patient.scheduler.deaf = False
    patient.probe.close()
    assert patient.probe.left == ""


def test_the_probe_is_small() -> None:
    """Protects the queue wait: few nodes and minutes, but never fewer than a queue takes."""
    big = replace(FACILITY, nodes=128, walltime="24:00:00", partition="prod")
    small = probe_facility(big, 2)
    assert (small.nodes, small.walltime) == (2, "00:10:00")
    assert probe_facility(replace(big, walltime="00:05:00"), 2).walltime == "00:05:00"
    queue = QueueConfig(partition="prod", min_nodes=65)
    assert probe_facility(replace(big, queues=[queue]), 2).nodes == 65
    assert probe_facility(FACILITY, 2).nodes == 1


def test_a_probe_that_measures_has_time_for_it(tmp_path: Path) -> None:
    """Protects large machines: collectives take minutes, which the other checks do not have."""
    patient = FacilityExam(tmp_path)
    patient.probe = Probe(
        "x", FACILITY, patient.root, patient.scheduler, patient.clock, 1800.0, bandwidth=True
    )
    patient.probe.start()
    asked = json.loads((patient.root / "probe" / "ask.json").read_text())
    assert asked["bandwidth"] is True
    for rank in (0, 1):
        patient.tell("hello", rank, wall=patient.clock.wall())
    assert not patient.probe.poll()
    patient.clock.sleep(500.0)
    assert not patient.probe.poll()
    patient.clock.sleep(300.0)
    assert patient.probe.poll()
    patient.probe.close()
    long = replace(FACILITY, walltime="05:00:00")
    assert probe_facility(long, 2, bandwidth=True).walltime == "00:20:00"
    assert probe_facility(long, 2).walltime == "00:10:00"
