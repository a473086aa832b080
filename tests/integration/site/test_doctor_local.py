"""The doctor with a real probe job on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from worlds.jobs import install_fake_pbs

from flwr_hpc.plan.bandwidth import kept
from flwr_hpc.plan.config import compose_plan
from flwr_hpc.plan.ranking import rank

ROOT = Path(__file__).parents[3]


def doctor(
    where: Path, *arguments: str, name: str = "local_a"
) -> tuple[int, dict[str, dict[str, str]], str]:
    """Return the exit code, the findings by name and what was said besides."""
    done = subprocess.run(
        [sys.executable, "-m", "flwr_hpc.doctor", f"+facility={name}", "--json", *arguments],
        cwd=where, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    findings = json.loads(done.stdout)["facilities"][name]
    return done.returncode, {f["name"]: f for f in findings}, done.stderr


def test_two_ranks(tmp_path: Path) -> None:
    """Protects the probe itself: files, packages and rendezvous as the trainer has them."""
    code, found, said = doctor(tmp_path)
    assert code == 0, found
    for name in ("probe job", "shared files", "packages", "rendezvous", "clock"):
        assert found[name]["status"] == "pass", found[name]
    assert "2 ranks (cpu)" in found["rendezvous"]["observed"]
    assert "2 ranks at work" in said
    assert not list(tmp_path.iterdir())


def test_bandwidth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the whole way from a job's ranks to the plan: four ranks, every placement."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "here").mkdir()
    code, found, _ = doctor(tmp_path / "here", "--bandwidth", "facilities.local_a.ranks_per_node=4")
    assert code == 0, found
    assert found["bandwidths"]["status"] == "pass", found["bandwidths"]
    assert not list((tmp_path / "here").iterdir())
    measured = kept("local_a")
    assert measured is not None
    assert [(row.inner, row.size) for row in measured.rows] == [(1, 2), (1, 4), (2, 2)]
    for row in measured.rows:
        assert min(row.all_gather, row.reduce_scatter, row.all_reduce) > 0
    config = compose_plan(
        ["model=tiny_llama", "+facility=local_a", "facilities.local_a.ranks_per_node=4"]
    )
    assert rank(config, "local_a").machine.bandwidths.gb_s(2, 2) == measured.rows[2].gb_s


def test_a_job_that_dies(tmp_path: Path) -> None:
    """Protects from waiting for a job whose first line fails."""
    code, found, _ = doctor(tmp_path, "facilities.local_a.setup=['exit 3']")
    assert code == 1
    assert "ended early" in found["probe job"]["observed"]
    assert found["rendezvous"]["status"] == "skipped"
    assert not list(tmp_path.iterdir())


def test_pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects PBS: its commands, and ranks started by mpiexec that meet."""
    install_fake_pbs(tmp_path / "fake", monkeypatch)
    shape = {"account": "null", "gpus_per_node": 0, "ranks_per_node": 2, "cpus_per_rank": 1}
    fields = [f"facilities.pbs.{key}={value}" for key, value in shape.items()]
    (tmp_path / "here").mkdir()
    code, found, _ = doctor(tmp_path / "here", *fields, name="pbs")
    assert code == 0, found
    assert found["scheduler commands"]["observed"] == "qsub qstat qdel"
    assert found["account and limits"]["status"] == "skipped"
    assert "2 ranks (cpu)" in found["rendezvous"]["observed"]
    assert not list((tmp_path / "here").iterdir())
