"""What all schedulers share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.schedulers.base import JobSpec, heal_pickle, stderr_tail
from flwr_hpc.schedulers.local.adapter import LocalScheduler
from flwr_hpc.schedulers.script import job_env, rank_command
from flwr_hpc.worker.entry import work

ROOT = Path(__file__).parents[3]


def test_facilitys_environment_wins_over_defaults_but_not_over_the_name() -> None:
    """Protects the user's settings, and the name by which a job is found again."""
    facility = FacilityConfig(cpus_per_rank=4, env={"A": "1", "FLWR_HPC_JOB": "x"})
    env = job_env(JobSpec("n", Path("/f"), facility, work, env={"A": "2"}))
    assert (env["OMP_NUM_THREADS"], env["A"], env["FLWR_HPC_JOB"]) == ("4", "2", "n")
    assert env["FLWR_HPC_WALLTIME_S"] == "3600"


def test_container_command_quotes_and_binds() -> None:
    """Protects ranks in containers: devices, folders, paths with spaces."""
    facility = FacilityConfig(container="/im age.sif", gpus_per_node=1)
    command = rank_command(JobSpec("n", Path("/f f"), facility, work, binds=("/s",)))
    assert command == (
        "apptainer exec --nv --bind /s '/im age.sif' python3 -u -m submitit.core._submit '/f f'"
    )


def test_last_words_are_those_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    """Protects the cause of a failure from the noise of the ranks it took along."""
    job = {"id": "5", "folder": str(tmp_path)}
    assert stderr_tail(job) == ""
    for rank, text in enumerate(["", "warning\n", "ValueError: cause", "RuntimeError: peer"]):
        (tmp_path / f"5_{rank}_log.err").write_text(text)
        os.utime(tmp_path / f"5_{rank}_log.err", (rank, rank))
    assert stderr_tail(job) == "ValueError: cause"


def test_only_a_nameless_pickle_is_healed(tmp_path: Path) -> None:
    """Protects results and other jobs' pickles from being renamed."""
    (tmp_path / "4_0_result.pkl").write_bytes(b"r")
    heal_pickle(tmp_path, "5")
    assert [p.name for p in tmp_path.iterdir()] == ["4_0_result.pkl"]
    (tmp_path / "aa.pkl").write_bytes(b"p")
    heal_pickle(tmp_path, "5")
    assert (tmp_path / "5_submitted.pkl").read_bytes() == b"p"


@pytest.mark.parametrize(
    ("said", "outcome", "reason"),
    [
        ("noise\nwalltime exceeded\n", "timeout", "walltime exceeded"),
        ("rank 1 exited with code 3\n", "failed", "rank 1 exited with code 3"),
        ("cancelled\n", "cancelled", "cancelled"),
        ("", "failed", "the job's controller was killed"),
        (None, "failed", "the job left no word"),
    ],
)
def test_how_a_local_job_ended(said: str | None, outcome: str, reason: str, tmp_path: Path) -> None:
    """Protects what follows from the end of a local job: its controller's last word."""
    if said is not None:
        (tmp_path / "controller.err").write_text(said)
    job = {"id": "0", "name": "n", "folder": str(tmp_path), "submitted_s": 1.0}
    info = LocalScheduler().infos([job | {"host": socket.gethostname()}])["n"]
    assert (info.state, info.outcome, info.reason) == ("ended", outcome, reason)
    assert LocalScheduler().infos([job | {"host": "elsewhere"}])["n"].state == "unknown"


def test_jobs_import_no_torch() -> None:
    """Protects the login node: launching needs a few dozen megabytes."""
    code = (
        "import sys, flwr_hpc.site.manager;"
        "import flwr_hpc.schedulers.local.adapter, flwr_hpc.schedulers.slurm.adapter;"
        "print([m for m in ('torch', 'wandb', 'transformers') if m in sys.modules])"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert out.strip() == "[]"
