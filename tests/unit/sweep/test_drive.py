"""The points of a sweep run side by side, fail by themselves, and go on after an interruption."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from worlds.clock import FakeClock

from flwr_hpc.errors import UserError
from flwr_hpc.sweep.drive import command, failure, run_points
from flwr_hpc.sweep.folder import Point, SweepDir


@dataclass
class Command:
    """A point's command that ends after some looks, or when it gets a signal."""

    looks: int
    code: int
    signals: list[int] = field(default_factory=list)

    def poll(self) -> int | None:
        self.looks -= 1
        if self.signals:
            return 128 + self.signals[0]
        return self.code if self.looks < 0 else None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


@dataclass
class Commands:
    """Starts commands, and counts how many run at the same time."""

    folder: SweepDir
    codes: dict[str, int]
    running: int = 0
    most: int = 0
    slots: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    started: dict[str, Command] = field(default_factory=dict)
    then: Callable[[str], Any] = lambda what: None

    def start(self, point: Point, slot: int) -> Any:
        self.slots[point.name] = slot
        run_dir = self.folder.run_dir(point)
        run_dir.mkdir(parents=True, exist_ok=True)
        code = self.codes.get(point.name, 0)
        self.folder.log(point).write_text("error: out of memory\n" if code else "fine\n")
        self.running += 1
        self.most = max(self.most, self.running)
        self.started[point.name] = Command(len(self.started) % 3, code)
        return self.started[point.name]

    def say(self, what: str, point: Point) -> None:
        self.running -= what != "started"
        self.said.append(f"{point.name} {what}")
        self.then(self.said[-1])


def _sweep(tmp_path: Path, count: int = 5, **codes: int) -> tuple[SweepDir, Commands]:
    folder = SweepDir(tmp_path / "sweep")
    folder.add([[f"seed={i}"] for i in range(count)], None)
    return folder, Commands(folder, {name.removeprefix("p"): code for name, code in codes.items()})


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_failed_point_is_not_the_end(tmp_path: Path, parallel: int) -> None:
    """Protects a night's sweep: one point out of memory, all others run, N at a time."""
    folder, commands = _sweep(tmp_path, p001=2)
    number = run_points(
        folder, folder.points(), parallel, commands.start, commands.say, FakeClock()
    )
    assert (number, commands.most) == (0, parallel)
    assert [p.code for p in folder.points()] == [0, 2, 0, 0, 0]
    assert folder.points()[1].reason == "out of memory"
    assert {*commands.slots.values()} == {*range(parallel)}


def test_points_at_a_time_have_gpus_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects points in one allocation from training on the same GPU."""
    folder, _ = _sweep(tmp_path)
    given: list[str] = []

    def note(words: list[str], env: dict[str, str], **_: Any) -> None:
        given.append(env.get("CUDA_VISIBLE_DEVICES", "none"))

    monkeypatch.setattr("flwr_hpc.sweep.drive.subprocess.Popen", note)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command(folder, 0, 2)(folder.points()[0], 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    command(folder, 0, 2)(folder.points()[0], 1)
    command(folder, 0, 0)(folder.points()[0], 1)
    assert given == ["2,3", "6,7", "4,5,6,7"]


def test_an_interruption_reaches_every_point_and_starts_no_other(tmp_path: Path) -> None:
    """Protects Ctrl-C: it is passed on once, waited for, and the points are to go on."""
    folder, commands = _sweep(tmp_path)

    def interrupt(what: str) -> None:
        if what == "001 started":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    commands.then, before = interrupt, signal.getsignal(signal.SIGINT)
    number = run_points(folder, folder.points(), 2, commands.start, commands.say, FakeClock())
    assert number == signal.SIGINT
    assert {n: c.signals for n, c in commands.started.items()} == {"000": [2], "001": [2]}
    assert [p.code for p in folder.points()] == [None] * 5
    assert signal.getsignal(signal.SIGINT) is before


def test_a_sweep_grows_and_keeps_what_has_ended(tmp_path: Path) -> None:
    """Protects the command repeated with more values: old points keep their folders and ends."""
    folder, _ = _sweep(tmp_path, 2)
    folder.end(folder.points()[1], 0)
    names = [p.name for p in folder.add([["seed=9"], ["seed=1"]], None)]
    assert names == ["000", "001", "002"]
    assert [(p.overrides, p.code) for p in folder.points()][1:] == [
        (["seed=1"], 0),
        (["seed=9"], None),
    ]


def test_one_command_works_on_a_sweep(tmp_path: Path) -> None:
    """Protects points from being run twice at the same time."""
    folder, _ = _sweep(tmp_path)
    with (
        folder.lock(),
        pytest.raises(UserError, match=r"in use by another flwr_hpc\.run -m"),
        folder.lock(),
    ):
        pass


@pytest.mark.parametrize(
    ("log", "summary", "reason"),
    [
        ("a\nfailed: round 1: diverged   (see logs/x.log)\nb", None, "round 1: diverged"),
        ("error: train.lr=x\n", None, "train.lr=x"),
        ("Traceback", {"status": "failed", "error": "disk"}, "disk"),
        ("Killed", None, "exit code 9, see"),
    ],
)  # fmt: skip
def test_the_reason_is_the_commands_last_word(
    tmp_path: Path, log: str, summary: dict[str, str] | None, reason: str
) -> None:
    """Protects the table: it says why a point failed."""
    folder, _ = _sweep(tmp_path)
    point = folder.points()[0]
    folder.run_dir(point).mkdir()
    folder.log(point).write_text(log)
    if summary:
        (folder.run_dir(point) / "summary.json").write_text(json.dumps(summary))
    assert failure(folder, point, 9).startswith(reason)
