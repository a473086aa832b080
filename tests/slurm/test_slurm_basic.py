"""One allocation on a real cluster, from the first message to the release."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.cluster import Cluster
from worlds.hosts.stranger import open_to_others
from worlds.site.slurm_site import SlurmSite

from flwr_hpc.errors import UserError
from flwr_hpc.files import private_files
from flwr_hpc.schedulers.slurm.adapter import SlurmScheduler

pytestmark = pytest.mark.slurm


def test_an_allocation_on_a_real_cluster(slurm: Cluster, tmp_path: Path) -> None:
    """Protects the whole path: sbatch, 2 nodes x 2 ranks by srun, an order, accounting, release."""
    ours = SlurmSite(slurm, tmp_path, nodes=2, ranks_per_node=2)
    with private_files():  # as sites submit
        order = ours.submit()
    status = ours.result(order)
    assert status.state == "done", status.error
    assert status.allocation == "a0000"
    (job,) = ours.site().live_jobs()
    ours.end()
    info = SlurmScheduler(ours.facility).infos([job])[job["name"]]
    assert (info.state, info.outcome, info.nodes, info.restarts) == ("ended", "completed", 2, 0)
    assert info.queue_s is not None
    assert ours.trained() == [order]
    assert len(list(Path(job["folder"]).glob("*_log.out"))) == 4
    assert open_to_others(Path(job["folder"])) == {}


def test_a_refused_job(slurm: Cluster, tmp_path: Path) -> None:
    """Protects the reading of sbatch's own words."""
    status = SlurmSite(slurm, tmp_path, partition="nowhere").site().acquire()
    assert status.fatal
    assert "partition" in status.error
    assert UserError.__name__ not in status.error
