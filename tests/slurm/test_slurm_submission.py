"""slurmctld dies while a job is submitted to it: which was taken is not known, and is found out."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from pathlib import Path

import pytest
from lab.cluster import Cluster
from lab.host import LabError
from worlds.site.slurm_site import SlurmSite

from flwr_hpc.schedulers.base import SchedulerUnavailableError
from flwr_hpc.schedulers.command import Answer
from flwr_hpc.schedulers.slurm import parse
from flwr_hpc.schedulers.slurm.adapter import SlurmScheduler

pytestmark = pytest.mark.slurm

TIMES = 3


class Killer:
    """Kills slurmctld at a moment, drawn from a seed, of the next sbatch."""

    def __init__(self, slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self._slurm, self._once = slurm, SlurmScheduler._once
        self._moments = random.Random(13)
        self._timer: threading.Timer | None = None
        self.armed = False
        self.took_s = 0.0  # an undisturbed sbatch, on a machine as busy as this
        self.unanswered: list[str] = []
        killer = self

        def once(self: SlurmScheduler, command: list[str], stdin: str, timeout_s: float) -> Answer:
            return killer.run(self, command, stdin, timeout_s)

        monkeypatch.setattr(SlurmScheduler, "_once", once)

    def run(
        self, scheduler: SlurmScheduler, command: list[str], stdin: str, timeout_s: float
    ) -> Answer:
        armed = command[0] == "sbatch" and self.armed
        if armed:
            self.armed = False
            moment_s = self._moments.uniform(0.0, self.took_s)
            self._timer = threading.Timer(moment_s, self._slurm.kill, ("slurmctld",))
            self._timer.start()
        began = time.monotonic()
        answer = self._once(scheduler, command, stdin, timeout_s)
        if command[0] == "sbatch":
            if answer.code:
                self.unanswered.append(answer.err)
            elif armed:  # too late: sooner the next time
                self.took_s /= 2
            else:
                self.took_s = self.took_s or time.monotonic() - began
        return answer

    def wait(self) -> None:
        assert self._timer is not None
        self._timer.join()


def test_slurmctld_dies_in_the_middle_of_a_submission(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the run and the job: no refusal, no second job, none that nobody knows of."""
    killer = Killer(slurm, monkeypatch)
    for k in itertools.count():
        if k > TIMES and killer.unanswered:
            break
        ours = SlurmSite(slurm, tmp_path / str(k), lost_after_s=4)
        killer.armed = k > 0
        order = ours.submit()
        if k > 0:
            killer.wait()
            assert ours.collect(order).state != "failed"
            slurm.start("slurmctld")
            _end_others(slurm, ours.key)
        status = ours.result(order)
        assert status.state == "done", status.error
        assert ours.trained() == [order]
        ours.end()


def test_request_that_is_taken_late_leaves_no_second_job(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the queue: sbatch outlives a launcher, and may be through after its successor's."""
    ours, once, lost = SlurmSite(slurm, tmp_path), SlurmScheduler._once, []

    def delay(self: SlurmScheduler, command: list[str], stdin: str, timeout_s: float) -> Answer:
        if command[0] == "sbatch" and not lost:
            lost.append(lambda: once(self, command, stdin, timeout_s))
            raise SchedulerUnavailableError("sbatch: no answer")
        return once(self, command, stdin, timeout_s)

    monkeypatch.setattr(SlurmScheduler, "_once", delay)
    order = ours.submit(gate=0)
    ours.until(lambda: ours.collect(order) and ours.spool.allocations()[-1].job())
    late = parse.read_sbatch(lost[0]().out)
    assert late not in ("", ours.job())
    ours.until(lambda: ours.collect(order) and "CANCELLED" in _state(slurm, late))
    assert _state(slurm, ours.job()) in ("PENDING", "CONFIGURING", "RUNNING")
    ours.open_gate()
    assert ours.result(order).state == "done"
    assert ours.trained() == [order]
    ours.site().release()
    ours.until(lambda: not ours.site().live_jobs())


def _state(slurm: Cluster, job: str) -> str:
    return slurm.slurm("squeue", "-h", "--states=all", "-j", job, "-o", "%T").strip()


def _end_others(slurm: Cluster, key: str) -> None:
    """End the jobs of former rounds that slurmctld, with an older state, takes for running."""
    for line in slurm.slurm("squeue", "-h", "-o", "%i %j").splitlines():
        job, _, name = line.partition(" ")
        if not name.startswith(key):
            with contextlib.suppress(LabError):  # it has just found out by itself
                slurm.slurm("scancel", job)
