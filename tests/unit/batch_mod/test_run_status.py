"""Whether Flower still runs a run."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from worlds.clock import FakeClock

from flwr_hpc.batch_mod import run_status
from flwr_hpc.batch_mod.run_status import RunWatch, flower_says, read_state

RUNS = {"success": True, "runs": [{"run-id": "7", "status": "finished:stopped", "elapsed": 3.0}]}


def watch(states: list[str], every_s: float = 60.0) -> tuple[RunWatch, FakeClock, list[float]]:
    clock, asked = FakeClock(), []

    def ask(run_id: int) -> str:
        asked.append(clock.now())
        return states.pop(0)

    return RunWatch(7, every_s, ask, clock.now), clock, asked


def test_it_asks_from_time_to_time() -> None:
    """Protects the login node from a process for every poll, and short messages from any."""
    one, clock, asked = watch(["running", "running", "finished:stopped"])
    said = []
    while not (state := one.ended()):
        said.append(state)
        clock.sleep(5.0)
    assert state == "finished:stopped"
    assert [b - a for a, b in pairwise(asked)] == [60.0, 60.0]


def test_where_nobody_answers_it_asks_more_rarely() -> None:
    """Protects sites whose SuperLink answers nodes alone."""
    one, clock, asked = watch([""] * 99)
    for _ in range(3600):
        assert one.ended() == ""
        clock.sleep(1.0)
    assert [b - a for a, b in pairwise(asked)] == [120.0, 240.0, 480.0, 900.0, 900.0]
    never, clock, asked = watch([], every_s=0)
    clock.sleep(1e6)
    assert (never.ended(), asked) == ("", [])


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (json.dumps(RUNS), "finished:stopped"),
        (json.dumps(RUNS).replace('"7"', '"8"'), ""),
        ('{"success": false, "error-message": "Run ID not found"}', ""),
        ("Connection refused", ""),
        ("", ""),
    ],
)
def test_answers_of_flower(text: str, state: str) -> None:
    """Protects jobs from an answer that says nothing about their run."""
    assert read_state(text, 7) == state


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        (["--superlink", "h:1", "--insecure"], ['address = "h:1"', "insecure = true"]),
        (
            ["--superlink=h:1", "--root-certificates=/ca.pem"],
            ['address = "h:1"', 'root-certificates = "/ca.pem"'],
        ),
    ],
)
def test_the_nodes_own_superlink_is_asked(
    command: list[str], lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects users from a setting that the SuperNode's command has already."""
    flwr = tmp_path / "flwr"
    flwr.write_text(
        f"#!/bin/sh\necho $@ >{tmp_path}/asked; cat $FLWR_HOME/config.toml >>{tmp_path}/asked\n"
        f"cat <<'END'\n{json.dumps(RUNS)}\nEND\n"
    )
    flwr.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    above = [["flower-superexec"], ["python", "flower-supernode", *command], ["bash"]]
    monkeypatch.setattr(run_status, "_commands_above", lambda: above)
    assert flower_says(7) == "finished:stopped"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["list superlink --run-id=7 --format=json", "[superlink.superlink]", *lines]


def test_a_node_without_a_superlink_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects nodes whose SuperLink is not named: nothing is asked."""
    monkeypatch.setattr(run_status, "_commands_above", lambda: [["pytest"]])
    monkeypatch.setattr(run_status.subprocess, "run", None)
    assert flower_says(7) == ""
