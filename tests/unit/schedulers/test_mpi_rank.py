"""How a rank started by mpiexec learns its place and its walltime."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from worlds.schedulers.pbs_answers import NOBODY, answer, job

from flwr_hpc.schedulers import mpi_rank
from flwr_hpc.schedulers.mpi_rank import granted_s, place

RANKS = {
    "hydra": {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"},
    "pals": {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1"},
    "openmpi": {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    "bare": {"PMI_RANK": "5"},
    "pmix": {"PMIX_RANK": "5"},
}


@pytest.mark.parametrize("launcher", RANKS)
def test_rank_by_every_launcher(launcher: str) -> None:
    """Protects 2 nodes x 4 ranks under each launcher that centres use."""
    env = {"SUBMITIT_LOCAL_NTASKS": "8", "SUBMITIT_LOCAL_JOB_NUM_NODES": "2", "PBS_JOBID": "21.p"}
    assert place(env | RANKS[launcher]) == {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "21.p",
        "SUBMITIT_LOCAL_GLOBALID": "5",
        "SUBMITIT_LOCAL_LOCALID": "1",
        "SUBMITIT_LOCAL_NODEID": "1",
    }


@pytest.mark.parametrize(
    ("env", "said"),
    [({}, "tells no rank"), ({"PMI_RANK": "0", "PMI_SIZE": "1"}, "started 1 ranks")],
)
def test_wrong_launcher_is_noticed(env: dict[str, str], said: str) -> None:
    """Protects against eight trainings of one rank each."""
    given = {"SUBMITIT_LOCAL_NTASKS": "8", "SUBMITIT_LOCAL_JOB_NUM_NODES": "2", "PBS_JOBID": "21.p"}
    with pytest.raises(RuntimeError, match=said):
        place(given | env)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (answer(j21=job(Resource_List={"walltime": "00:10:00"})), 600.0),
        (answer(j21=job(Resource_List={})), None),
        (NOBODY, None),
        ("", None),
    ],
)
def test_granted_walltime(text: str, seconds: float | None) -> None:
    """Protects the worker's clock where an operator lowered the walltime."""
    assert granted_s(text) == seconds


@pytest.mark.parametrize(
    ("granted", "kept"), [("00:10:00", "600"), ("02:00:00", "3600"), ("", "3600")]
)
def test_walltime_is_only_shortened(
    granted: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects nodes that do not reach the server, or have no qstat."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if not granted:
            raise FileNotFoundError("qstat")
        text = answer(j21=job(Resource_List={"walltime": granted}))
        return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setenv("FLWR_HPC_WALLTIME_S", "3600")
    monkeypatch.setattr(subprocess, "run", run)
    mpi_rank._shorten("21.pbshost")
    assert mpi_rank.os.environ["FLWR_HPC_WALLTIME_S"] == kept
