"""Where an allocation's time goes; the clock is injected."""

from __future__ import annotations

import pytest
from worlds.clock import FakeClock

from flwr_hpc.worker.phase_timer import PhaseTimer, process_start


def test_every_second_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The phases add up to the process's age, also while one is running."""
    clock = FakeClock(1000.0, epoch=1e9)
    monkeypatch.setenv("FLWR_HPC_T0", str(clock.now() - 2.0))
    timer = PhaseTimer({"load": 7.0}, clock)  # of an earlier start of the job
    timer.switch_to("load")
    clock.sleep(5.0)
    timer.switch_to("idle")
    clock.sleep(1.0)
    with timer.during("train"):
        clock.sleep(3.0)
    clock.sleep(1.0)
    assert timer.seconds() == {
        "startup": 2.0, "load": 12.0, "train": 3.0, "evaluate": 0.0, "transfer": 0.0, "idle": 2.0,
    }  # fmt: skip


def test_process_start_is_in_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start-up is counted from the interpreter's start, or from when the job says it began."""
    clock = FakeClock(1000.0, epoch=1e9)
    monkeypatch.delenv("FLWR_HPC_T0", raising=False)
    assert process_start(clock) < clock.now()
    monkeypatch.setenv("FLWR_HPC_T0", "12.5")
    assert process_start(clock) == 12.5
    monkeypatch.setenv("FLWR_HPC_T0", "1012.5")  # of a host that has been up for longer
    assert process_start(clock) == clock.now()
