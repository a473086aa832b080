"""slurmctld dies while a job is submitted to it: which was taken is not known, and is found out."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from lab.cluster import Cluster
from worlds.slurm_site import SlurmSite

from flwr_hpc.schedulers.command import Answer
from flwr_hpc.schedulers.slurm.adapter import SlurmScheduler

pytestmark = pytest.mark.slurm

TIMES = 10
WITHIN_S = 0.06  # sbatch takes about half of that


def test_slurmctld_dies_in_the_middle_of_a_submission(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the run and the job: no refusal, no second job, none that nobody knows of."""
    moments = random.Random(13)
    answers: list[Answer] = []
    killers: list[threading.Timer] = []
    once = SlurmScheduler._once

    def submit(self: SlurmScheduler, command: list[str], stdin: str, timeout_s: float) -> Answer:
        if command[0] != "sbatch":
            return once(self, command, stdin, timeout_s)
        if len(killers) == len(sites) - 1:  # the first time at this site
            kill = threading.Timer(moments.uniform(0.0, WITHIN_S), slurm.kill, ("slurmctld",))
            killers.append(kill)
            kill.start()
        answers.append(once(self, command, stdin, timeout_s))
        return answers[-1]

    monkeypatch.setattr(SlurmScheduler, "_once", submit)
    sites: list[SlurmSite] = []
    for k in range(TIMES):
        ours = SlurmSite(slurm, tmp_path / str(k), lost_after_s=4)
        sites.append(ours)
        order = ours.submit()
        killers[k].join()
        assert ours.collect(order).state != "failed"
        slurm.start("slurmctld")
        status = ours.result(order)
        assert (status.state, status.allocation) == ("done", "a0000"), status.error
        assert ours.trained() == [order]
        ours.end()
    unanswered = [answer.err for answer in answers if answer.code]
    print(*unanswered, sep="")
    assert unanswered, "slurmctld always died too late"
