"""The wheel, installed outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from worlds.runs.run import ROOT

from flwr_hpc.ssh.wheel import NAME, build_wheel

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def _built(folder: Path) -> Path:
    """Build the wheel from a copy of the sources."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    offline = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*PIP, "wheel", *offline, "-w", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("flwr_hpc-*.whl")
    return wheel


def _carried(folder: Path) -> Path:
    """Make the wheel that goes to other hosts."""
    wheel = folder / NAME
    wheel.write_bytes(build_wheel())
    return wheel


@pytest.fixture(scope="module", params=[_built, _carried])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a wheel alone into a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel, target = request.param(folder), folder / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def _run(installed: Path, cwd: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_lands_beside_the_packages(installed: Path) -> None:
    """Protects other packages: conf/ and slurm_templates/ are never top-level."""
    tops = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert tops == {"flwr_hpc", "strategies"}


def test_commands_work_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """Protects users of the wheel: configuration, templates and strategies are in it."""
    where = _run(installed, tmp_path, "-c", "import flwr_hpc; print(flwr_hpc.__file__)")
    assert where.startswith(str(installed))
    assert "local_a" in _run(installed, tmp_path, "-m", "flwr_hpc.run", "--cfg", "job")
    assert "#!/bin/bash" in _run(installed, tmp_path, "-m", "flwr_hpc.run", "dry_run=true")
    slurm = ["+facility=slurm", "facilities.slurm.account=p1", "dry_run=true"]
    assert "#SBATCH --account=p1" in _run(installed, tmp_path, "-m", "flwr_hpc.run", *slurm)
