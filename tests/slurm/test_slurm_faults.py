"""What goes wrong at a Slurm centre, done on purpose to a real cluster.

Every test: the order is finished once, by the work already done where there was time to keep it,
or fails with Slurm's own words; no job is left behind and none was submitted twice.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from lab.cluster import Cluster
from lab.fixtures import Lab
from lab.plan import Shape
from worlds.jobs import until
from worlds.site.slurm_site import SlurmSite

from flwr_hpc.config.schema import AllocationConfig

pytestmark = pytest.mark.slurm

# Does not give a node up while its daemon is away, however long the test takes for that.
PATIENT = Shape(nodes=1, accounting=False, slurmd_timeout_s=600)
WHOLE = 5  # steps that an order of `SlurmSite` counts when it is trained to its end


def test_preemption_with_requeue(slurm: Cluster, tmp_path: Path) -> None:
    """Protects an order whose job makes room for a more urgent one: it goes on where it was."""
    ours = SlurmSite(slurm, tmp_path, partition="scavenge", options={"requeue": ""})
    order = ours.submit(seconds=4, gate=30)
    ours.until_step(order, 30)
    other = slurm.occupy(1, partition="urgent")
    ours.until(lambda: slurm.slurm("squeue", "-h", "-j", other, "-o", "%T").strip() != "PENDING")
    ours.open_gate()
    status = ours.result(order)
    assert status.state == "done", status.error
    assert ours.trained() == [order]
    assert ours.allocations() == ["a0000"]
    assert status.result is not None
    if status.result.steps == WHOLE:
        kept = [int(p.name.rpartition("@")[2]) for p in ours.spool.checkpoints.glob(f"{order}@*")]
        assert max(kept) >= 30
    else:  # Slurm's warning was seen ahead of its end: the part was delivered
        assert status.result.steps >= 30
    ours.end()


def test_walltime_ends_with_a_successor(slurm: Cluster, tmp_path: Path) -> None:
    """Protects a long order: its part comes back in time, and the next job is there already."""
    limits = AllocationConfig(renew_ahead="00:00:40")
    ours = SlurmSite(slurm, tmp_path, limits, walltime="00:01:00")
    order = ours.submit(seconds=300)
    status = ours.result(order)
    assert status.state == "done", status.error
    assert status.result is not None
    assert 0 < status.result.steps < 6000
    then = ours.result(ours.submit(sequence=1))
    assert then.state == "done"
    assert then.allocation > "a0000"
    assert len(ours.trained()) == 2
    ours.end()
    jobs = ours.site().status().jobs
    assert jobs["a0001"]["submitted_s"] < jobs["a0000"]["ended_s"]


def test_preemption_with_grace(slurm: Cluster, tmp_path: Path) -> None:
    """Protects the same where Slurm warns first: a job that then leaves is not requeued."""
    slurm.slurm("scontrol", "update", "PartitionName=scavenge", "GraceTime=120")
    ours = SlurmSite(slurm, tmp_path, partition="scavenge", options={"requeue": ""})
    order = ours.submit(seconds=60, gate=30)
    ours.until_step(order, 30)
    slurm.occupy(1, partition="urgent")
    status = ours.result(order)
    assert status.state == "done", status.error
    assert status.result is not None
    assert 30 <= status.result.steps < 1200
    assert ours.result(ours.submit(sequence=1)).allocation == "a0001"
    assert len(ours.trained()) == 2
    ours.end()


def test_a_node_crashes(slurm: Cluster, tmp_path: Path) -> None:
    """Protects an order on a node that loses power: Slurm requeues it, another node does it."""
    ours = SlurmSite(slurm, tmp_path)
    order = ours.submit(seconds=2, gate=10)
    ours.until_step(order)
    node = ours.node()
    slurm.kill(node)
    ours.open_gate()
    status = ours.result(order)
    assert (status.state, status.allocation) == ("done", "a0000"), status.error
    assert ours.trained() == [order]
    assert node in slurm.slurm("sinfo", "-h", "-t", "down", "-o", "%N")
    ours.end()


def test_one_node_of_two_crashes(slurm: Cluster, tmp_path: Path) -> None:
    """Protects against half a job, where Slurm does not requeue: another waits for the node."""
    ours = SlurmSite(slurm, tmp_path, nodes=2, options={"no-requeue": ""})
    order = ours.submit(seconds=2, gate=10)
    ours.until_step(order)
    node = slurm.nodes[0]  # rank 0's
    slurm.kill(node)
    ours.until(lambda: _replaced(ours, order))
    ours.open_gate()
    slurm.start(node)
    status = ours.result(order)
    assert (status.state, status.allocation) == ("done", "a0001"), status.error
    assert ours.trained() == [order]
    ours.end()


def test_slurmd_restarts(lab: Lab, tmp_path: Path) -> None:
    """Protects a running job while its node's daemon is updated."""
    slurm = lab.cluster(PATIENT)
    ours = SlurmSite(slurm, tmp_path)
    order = ours.submit(seconds=4, gate=10)
    ours.until_step(order)
    node = ours.node()
    slurm.kill("slurmd", node)
    ours.open_gate()
    ours.until_step(order, 20)  # it goes on meanwhile
    slurm.start("slurmd", node)
    status = ours.result(order)
    assert (status.state, status.allocation) == ("done", "a0000"), status.error
    assert ours.trained() == [order]
    ours.end()


def test_slurmctld_restarts(slurm: Cluster, tmp_path: Path) -> None:
    """Protects a running order, and one handed in meanwhile, while nobody answers."""
    ours = SlurmSite(slurm, tmp_path / "a")
    waiting = SlurmSite(slurm, tmp_path / "b")
    order = ours.submit(seconds=3, gate=10)
    ours.until_step(order)
    slurm.kill("slurmctld", number=15)
    late = waiting.submit()
    assert waiting.collect(late).state == "queued"
    ours.open_gate()
    assert ours.result(order).state == "done"  # seen in the files, without Slurm
    slurm.start("slurmctld")
    assert waiting.result(late).state == "done"
    assert (ours.trained(), waiting.trained()) == ([order], [late])
    ours.end()
    waiting.end()


def test_slurmctld_loses_a_job_and_gives_its_id_away(slurm: Cluster, tmp_path: Path) -> None:
    """Protects against trust in ids: the job that has ours now is somebody else's."""
    filler = slurm.occupy(600, name="before")
    until(lambda: slurm.slurm("squeue", "-h", "-j", filler, "-o", "%T").strip() == "RUNNING")
    slurm.kill("slurmctld", number=15)  # it saves what it knows, and changes nothing any more
    state, saved = slurm.folder / "state", tmp_path / "state"
    shutil.copytree(state, saved)
    slurm.start("slurmctld")
    ours = SlurmSite(slurm, tmp_path, lost_after_s=4)
    order = ours.submit()
    lost = ours.job()
    slurm.kill("slurmctld")
    shutil.rmtree(state)  # it may have saved ours, too
    shutil.copytree(saved, state)
    shutil.rmtree(saved)
    slurm.start("slurmctld")
    thief = slurm.occupy(600, nodes=1)
    assert thief == lost, "the job was not lost"
    slurm.slurm("scancel", filler)
    status = ours.result(order)
    assert status.state == "done", status.error
    assert ours.trained() == [order]
    assert ours.job() != lost
    until(lambda: slurm.slurm("squeue", "-h", "-j", thief, "-o", "%T").strip() == "RUNNING")
    ours.end()


def test_slurmctld_loses_a_job_that_runs(slurm: Cluster, tmp_path: Path) -> None:
    """Protects an order whose job Slurm kills as a stranger's, or goes on with: done once."""
    ours = SlurmSite(slurm, tmp_path, lost_after_s=4)
    order = ours.submit(seconds=3)
    slurm.kill("slurmctld")
    slurm.start("slurmctld")
    status = ours.result(order)
    assert status.state == "done", status.error
    assert ours.trained() == [order]
    ours.end()


def test_an_operator_cancels(slurm: Cluster, tmp_path: Path) -> None:
    """Protects an order whose job somebody else ends: another job goes on with it."""
    ours = SlurmSite(slurm, tmp_path)
    order = ours.submit(seconds=4, gate=30)
    ours.until_step(order, 30)
    slurm.slurm("scancel", ours.job())
    ours.until(lambda: _replaced(ours, order))
    ours.open_gate()
    status = ours.result(order)
    assert (status.state, status.allocation) == ("done", "a0001"), status.error
    assert ours.trained() == [order]
    assert ours.allocations() == ["a0000", "a0001"]
    ours.end()


def test_a_partition_is_down(slurm: Cluster, tmp_path: Path) -> None:
    """Protects what waits for maintenance to end, and says so."""
    slurm.slurm("scontrol", "update", "PartitionName=main", "State=DOWN")
    ours = SlurmSite(slurm, tmp_path)
    order = ours.submit()
    ours.until(lambda: "PartitionDown" in ours.collect(order).reason)
    slurm.slurm("scontrol", "update", "PartitionName=main", "State=UP")
    assert ours.result(order).state == "done"
    assert ours.trained() == [order]
    assert ours.allocations() == ["a0000"]
    ours.end()


def test_an_account_is_rejected(slurm: Cluster, tmp_path: Path) -> None:
    """Protects a user with a wrong account from a retry loop: Slurm's own words, at once."""
    ours = SlurmSite(slurm, tmp_path, account="nowhere")
    status = ours.collect(ours.submit())
    assert (status.state, status.fatal) == ("failed", True)
    assert "Invalid account" in status.error
    assert "account" in status.error.splitlines()[-1]
    assert ours.site().acquire().fatal
    ours.end()


def test_no_accounting(slurm: Cluster, tmp_path: Path) -> None:
    """Protects against ends that only sacct would tell: slurmctld is asked as well."""
    ours = SlurmSite(slurm, tmp_path)
    slurm.kill("slurmdbd")
    order = ours.submit(seconds=3, gate=10)
    ours.until_step(order)
    slurm.slurm("scancel", ours.job())
    ours.until(lambda: _replaced(ours, order))
    ours.open_gate()
    status = ours.result(order)
    assert (status.state, status.allocation) == ("done", "a0001"), status.error
    assert ours.trained() == [order]
    ours.end()


def test_a_job_waits_too_long(slurm: Cluster, tmp_path: Path) -> None:
    """Protects a run from waiting for ever: the job is cancelled, Slurm's reason is told."""
    slurm.occupy(600)
    ours = SlurmSite(slurm, tmp_path, AllocationConfig(queue_deadline_s=3))
    status = ours.result(ours.submit())
    assert (status.state, status.fatal) == ("failed", False)
    assert "queue_deadline_s" in status.error
    # Slurm says Priority until it has tried to start the job, and Resources then.
    assert re.search(r"PENDING \((Resources|Priority)\)", status.error), status.error
    ours.end()


def test_an_operator_holds_a_job(slurm: Cluster, tmp_path: Path) -> None:
    """Protects against a hold that nobody lifts: said, cancelled, tried again within limits."""
    slurm.occupy(600)
    ours = SlurmSite(slurm, tmp_path, AllocationConfig(retries=0))
    order = ours.submit()
    slurm.slurm("scontrol", "hold", ours.job())
    status = ours.result(order)
    assert status.state == "failed"
    assert "JobHeld" in status.error
    ours.end()


def _replaced(ours: SlurmSite, order: str) -> bool:
    """Tell whether the order has a second job: the first has ended, and did not finish it."""
    return bool(ours.collect(order)) and len(ours.allocations()) == 2
