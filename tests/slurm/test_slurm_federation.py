"""Whole runs over several real clusters whose compute nodes reach nothing but their login node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab.cluster import Cluster
from lab.fixtures import Lab
from lab.plan import Shape
from worlds.jobs import until
from worlds.runs.run import SMALL, Run, trained_steps

pytestmark = pytest.mark.slurm

TWO_NODES = Shape(nodes=2, cpus=2)
ONE_NODE = Shape(nodes=1, cpus=2)


def facilities(folder: Path, *clusters: Cluster) -> list[str]:
    """Return the arguments that name the clusters; their facility files go into `folder`."""
    (folder / "facility").mkdir(parents=True)
    for cluster in clusters:
        text = cluster.layout.render("facility.yaml.j2")
        (folder / "facility" / f"{cluster.name}.yaml").write_text(text)
    names = ",".join(cluster.name for cluster in clusters)
    return [f"--config-dir={folder}", f"+facility=[{names}]"]


def ends_well(run: Run, *clusters: Cluster) -> None:
    """Wait for a run's end; check that one warm job did all of a cluster's work, and left."""
    assert run.end() == 0, run.said()
    for cluster in clusters:
        folder = run.dir / "facilities" / cluster.name / "allocations"
        (job,) = (json.loads(path.read_text()) for path in folder.glob("*/job.json"))
        ended = ("squeue", "-h", "--states=all", "-j", job["id"], "-o", "%T")
        assert cluster.slurm(*ended).split() == ["COMPLETED"], cluster.name
        assert not cluster.active_jobs()
    until(lambda: not run.left_behind())


@pytest.fixture
def small() -> list[str]:
    """Settings of a run of half a minute, without facilities."""
    return [s for s in SMALL if "local_" not in s]


def test_three_clusters(lab: Lab, tmp_path: Path, small: list[str]) -> None:
    """Protects one federation over three Slurm clusters, one job of 2 nodes x 2 ranks (FSDP)."""
    clusters = big, *_, last = [
        lab.cluster(TWO_NODES),
        lab.cluster(ONE_NODE),
        lab.cluster(ONE_NODE, 1),
    ]
    texts = zip(clusters, ("json", "logging", "email"), strict=True)
    data = [f"data.paths.{cluster.name}=[{text}]" for cluster, text in texts]
    one = f"facilities.{last.name}.ranks_per_node=1"
    where = facilities(tmp_path / "conf", *clusters)
    run = Run(tmp_path / "run", *where, *data, one, "train.steps=30", settings=small)
    ends_well(run, *clusters)
    sites = run.summary()["facilities"]
    assert set(sites) == {cluster.name for cluster in clusters}
    for site in sites.values():
        assert site["held_out_loss_last"] < site["held_out_loss_first"]
        assert site["node_hours"]["used"] > site["node_hours"]["from_ledger"] == 0.0
    (job,) = (run.dir / "facilities" / big.name / "allocations").glob("*/job")
    assert len(list(job.glob("*_log.out"))) == 4


def test_one_of_two_clusters_refuses(lab: Lab, tmp_path: Path, small: list[str]) -> None:
    """Protects one centre's work from another's refusal: it is left out, and says why."""
    well, refuses = lab.cluster(ONE_NODE), lab.cluster(ONE_NODE, 1)
    own = [f"data.paths.{well.name}=[json]", f"data.paths.{refuses.name}=[logging]"]
    ranks = [f"facilities.{c.name}.ranks_per_node=1" for c in (well, refuses)]
    wrong = f"facilities.{refuses.name}.account=nowhere"
    where = facilities(tmp_path / "conf", well, refuses)
    run = Run(tmp_path / "run", *where, *own, *ranks, wrong, "train.steps=10", settings=small)
    ends_well(run, well)
    sites = run.summary()["facilities"]
    assert sites[well.name]["steps"] > 0
    assert sites[well.name]["excluded"] is None
    assert "Invalid account" in sites[refuses.name]["excluded"]
    assert f"without {refuses.name}: Slurm refused the job" in run.said()


@pytest.mark.slow
def test_training_goes_on_beyond_the_walltime(lab: Lab, tmp_path: Path, small: list[str]) -> None:
    """Protects long training from short walltimes: partial results, and a successor that takes
    over the trainer's state, so that not one step is lost or done twice."""
    cluster = lab.cluster(ONE_NODE)
    name = cluster.name
    own = [f"data.paths.{name}=[json]", f"facilities.{name}.walltime=00:02:00"]
    where = facilities(tmp_path / "conf", cluster)
    run = Run(tmp_path / "run", *where, *own, f"train.steps={10**6}", settings=small)
    run.until_training(name, version=1)  # the first order was cut by its job's walltime
    running = cluster.slurm("squeue", "-h", "-t", "RUNNING", "-o", "%A").split()
    cluster.slurm("scancel", "--signal=USR2", *running)  # as Slurm warns of it
    assert run.end() == 0, run.said()
    done = [e["steps"] for e in run.events("order_done") if e["kind"] == "train"]
    assert len(done) == 2
    assert max(done) < 10**6
    site = run.dir / "facilities" / name
    assert len(list((site / "allocations").iterdir())) >= 2
    assert trained_steps(site) == sum(done)  # the trainer's own count, handed from job to job
    assert run.summary()["facilities"][name]["steps"] == sum(done)
    until(lambda: not cluster.active_jobs())  # those that were cancelled take a moment
