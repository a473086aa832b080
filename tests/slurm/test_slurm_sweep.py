"""The points of a sweep in one job of a real cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab.fixtures import Lab
from slurm.test_slurm_federation import TWO_NODES, facilities
from worlds.jobs import until
from worlds.runs.run import ROOT, SMALL

pytestmark = pytest.mark.slurm


def test_points_share_a_job(lab: Lab, tmp_path: Path) -> None:
    """Protects a queue from a job per point: two nodes work on four points, of which some fail."""
    cluster = lab.cluster(TWO_NODES)
    sweep, out, name = tmp_path / "sweep", tmp_path / "out", cluster.name
    shape = [f"facilities.{name}.nodes=2", f"facilities.{name}.ranks_per_node=1"]
    own = [s for s in SMALL if not s.startswith(("data.paths", "+fac", "fac", "rounds"))]
    command = [
        *(sys.executable, "-m", "flwr_hpc.run", "-m", *own, "rounds=1", "train.steps=10"),
        *(*facilities(tmp_path / "conf", cluster), *shape, "seed=1,2"),
        *(f"data.paths.{name}=[no_such_package],[json]", "sweep.ranks_per_point=1"),
        f"sweep.dir={sweep}",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with open(out, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=tmp_path)
    try:
        until(lambda: process.poll() is not None, tmp_path, explain=out.read_text)
    finally:
        process.kill()
    said = out.read_text()
    assert process.wait() == 0, said
    points = json.loads((sweep / "sweep.json").read_text())["points"]
    assert [one["status"] for one in points] == ["failed", "finished", "failed", "finished"], said
    assert "no_such_package" in points[0]["reason"]
    assert len({one["loss"] for one in points[1::2]}) == 2
    jobs = cluster.slurm("squeue", "-h", "--states=all", "-n", _job(sweep), "-o", "%T %D")
    assert jobs.split() == ["COMPLETED", "2"], said
    (taken,) = (sweep / "jobs" / "000").glob("taken-*")
    assert len(list(taken.iterdir())) == len(points)
    assert not (sweep / "jobs" / "001").exists()


def _job(sweep: Path) -> str:
    token = json.loads((sweep / "points.json").read_text())["token"]
    return f"sweep-{token}-000"
