"""What the tests of jobs share: waiting, looking at processes, finding a scheduler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from flwr_hpc.config import FacilityConfig

T = TypeVar("T")
TESTS = Path(__file__).parent
FAKES = TESTS / "contract" / "fake_slurm" / "slurm.py"


def until(what: Callable[[], T], timeout_s: float = 30.0) -> T:
    """Poll until `what` returns something true."""
    deadline = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(0.05)
    return value


def processes_of(name: str) -> list[psutil.Process]:
    """Return the living processes with a job's name in their environment."""
    found = psutil.process_iter(["environ", "status"])
    return [
        p
        for p in found
        if (p.info["environ"] or {}).get("FLWR_HPC_JOB") == name
        and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def command_line(process: psutil.Process) -> str:
    """Return a process's command line, empty when it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone, or a zombie
        return ""


def facility(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FacilityConfig:
    """Return a facility of two ranks: ``local``, ``fake_slurm`` or ``slurm``."""
    env = {"PYTHONPATH": str(TESTS)}
    if kind == "local":
        return FacilityConfig(scheduler="local", ranks_per_node=2, env=env)
    if kind == "fake_slurm":
        _install_fakes(tmp_path / "fake", monkeypatch)
    else:
        require_slurm()
        env["SLURM_CONF"] = os.environ["SLURM_CONF"]
    return FacilityConfig(ranks_per_node=2, walltime="00:10:00", env=env)


def require_slurm() -> None:
    """Skip the test unless a real cluster answers."""
    if not os.environ.get("SLURM_CONF") or not shutil.which("sbatch"):
        pytest.skip("needs a Slurm cluster: set SLURM_CONF and have sbatch in PATH")
    answer = subprocess.run(["sinfo", "-h"], capture_output=True, timeout=60, check=False)
    if answer.returncode:
        pytest.skip(f"the cluster in SLURM_CONF does not answer: {answer.stderr.decode()}")


def _install_fakes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "bin").mkdir(parents=True)
    for command in ("sbatch", "srun", "squeue", "sacct", "scancel"):
        program = home / "bin" / command
        program.write_text(f"#!{sys.executable}\n{FAKES.read_text()}")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))
