"""Processes whose helper ends, as SuperNode's and SuperLink's SuperExec may."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flwr_hpc.flower import processes
from flwr_hpc.flower.processes import Child, Processes

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "the-helper"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def tended(tmp_path: Path) -> Iterator[tuple[Processes, list[str]]]:
    said: list[str] = []
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    with Processes(tmp_path, {}, lock, said.append) as made:
        yield made, said
    os.close(lock)


def _until_helped(log: Path, starts: int) -> int:
    while len(pids := log.read_text().split() if log.exists() else []) < starts:
        time.sleep(0.02)
    return int(pids[-1])


def test_a_helper_that_ends_costs_its_owner(
    tended: tuple[Processes, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a site whose SuperExec died: the SuperNode that cannot notice is started again."""
    monkeypatch.setattr(processes, "LOOK_S", 0.0)
    monkeypatch.setattr(processes, "LACKING_S", 0.2)
    monkeypatch.setattr(processes, "RESTART_S", 0.0)
    made, said = tended
    child = Child(
        "node", lambda: [sys.executable, "-c", PARENT], restartable=True, helper="the-helper"
    )
    made.start(child)
    first = _until_helped(tmp_path / "node.log", 1)
    assert made.tend() == []
    assert said == []
    subprocess.run(["kill", "-9", str(first)], check=True)
    while len(said) < 2:
        assert made.tend() == []
        time.sleep(0.02)
    assert said[0] == "the the-helper of node has ended"
    assert "starting it again" in said[1]
    assert _until_helped(tmp_path / "node.log", 2) != first
    assert made.tend() == []


def test_the_superlink_without_its_helper_is_lost(
    tended: tuple[Processes, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from a SuperLink that will never start a ServerApp: it counts as ended."""
    monkeypatch.setattr(processes, "LOOK_S", 0.0)
    monkeypatch.setattr(processes, "HELPER_START_S", 0.2)
    made, _ = tended
    child = Child("link", lambda: ["sleep", "600"], helper="the-helper")
    made.start(child)
    while not (gone := made.tend()):
        time.sleep(0.02)
    assert gone == [child]
