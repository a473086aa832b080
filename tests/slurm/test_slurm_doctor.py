"""The doctor on a real cluster whose compute nodes reach their login node alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab.cluster import Cluster
from worlds.jobs import until

from flwr_hpc.plan.bandwidth import kept

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
SHAPE = {
    "account": "lab",
    "nodes": 2,
    "ranks_per_node": 1,
    "gpus_per_node": 0,
    "cpus_per_rank": 1,
    "walltime": "00:20:00",
}


def start(slurm: Cluster, tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    fields = SHAPE | {"env.SLURM_CONF": slurm.conf}
    settings = [f"facilities.slurm.{key}={value}" for key, value in fields.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "flwr_hpc.doctor", "+facility=slurm", *settings, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_nodes(
    slurm: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Protects the whole examination: Slurm's judgement, two nodes that meet, nothing left."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    doctor = start(slurm, tmp_path, "--json", "--bandwidth")
    out, err = doctor.communicate()
    found = {f["name"]: f for f in json.loads(out)["facilities"]["slurm"]}
    assert doctor.returncode == 0, found
    for name in (
        "account and limits",
        "probe job",
        "shared files",
        "packages",
        "rendezvous",
        "bandwidths",
    ):
        assert found[name]["status"] == "pass", found[name]
    assert "2 nodes for 00:20:00 accepted" in found["account and limits"]["observed"]
    for node in slurm.nodes:
        assert node in found["probe job"]["observed"]
    assert "2 ranks at work" in err
    measured = kept("slurm")
    assert measured is not None
    assert measured.nodes == list(slurm.nodes)
    assert [(row.inner, row.size) for row in measured.rows] == [(1, 2)]
    assert not list(tmp_path.iterdir())
    until(lambda: not slurm.active_jobs())


def test_a_refusal_and_a_queue_left_with_ctrl_c(slurm: Cluster, tmp_path: Path) -> None:
    """Protects Slurm's own words, and the queue from a probe that nobody waits for."""
    doctor = start(slurm, tmp_path, "facilities.slurm.account=wrong")
    out, _ = doctor.communicate()
    assert doctor.returncode == 1
    assert "Invalid account" in out
    assert "-> facilities.slurm.account=NAME; yours: sacctmgr" in out
    others = slurm.occupy(300)
    doctor = start(slurm, tmp_path)
    until(lambda: len(slurm.active_jobs()) == 2)  # sbatch's answer may be on its way
    doctor.send_signal(signal.SIGINT)
    out, err = doctor.communicate()
    assert doctor.returncode == 130
    assert "stopped; probe job cancelled: " in err
    until(lambda: slurm.active_jobs() == [others])
    assert not list(tmp_path.iterdir())
