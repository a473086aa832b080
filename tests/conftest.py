"""What holds for every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Several of these processes share the cores: their threads would wait for each other, busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from lab.fixtures import centres, lab, slurm, slurm_conf, three_centres

__all__ = ["centres", "lab", "slurm", "slurm_conf", "three_centres"]


def pytest_collection_finish() -> None:
    """Keep what was imported by now, torch among it, from being looked at by each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the waits of test jobs out of the user's own history."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HPC_STATE", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _own_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a rank in this process tells gloo from the jobs that later tests submit."""
    name = "GLOO_SOCKET_IFNAME"
    monkeypatch.setenv(name, "")  # so that it is put back afterwards
    monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _own_umask() -> Iterator[None]:
    """Keep the umask that a command sets in this process from the tests after it."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
