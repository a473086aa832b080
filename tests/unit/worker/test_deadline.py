"""When a worker ends: the walltime, by whichever clock tells it, and the scheduler's signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from flwr_hpc.worker.deadline import Deadline

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLWR_HPC_T0", str(time.monotonic()))  # the job begins now
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("asked", "granted", "end_in", "left"),
    [
        (None, None, None, None),
        (600.0, None, None, 600.0),
        (600.0, "300", None, 300.0),
        (600.0, "300", 100.0, 100.0),  # the scheduler knows better: the job began before us
        (600.0, "300", 900.0, 300.0),
        (600.0, "300", -5.0, 300.0),  # the clocks disagree
        (None, None, 100.0, 100.0),
    ],
)
def test_the_earlier_end_holds(
    asked: float | None, granted: str | None, end_in: float | None, left: float | None
) -> None:
    """Protects the result from a walltime that ends before the worker thinks it does."""
    env = {"FLWR_HPC_WALLTIME_S": granted or "", "FLWR_HPC_END_S": ""}
    if end_in is not None:
        env["FLWR_HPC_END_S"] = f"{time.time() + end_in:.0f}"
    ending = Deadline.detect(asked, env)
    found = ending.walltime_left()
    assert found == (None if left is None else pytest.approx(left, abs=2.0))


def test_time_to_write_is_kept() -> None:
    """Protects the writing of a result: the last step is the one that leaves time for it."""
    ending = Deadline.detect(100.0, {})
    assert ending.reserve_s == pytest.approx(10.0, abs=0.1)
    assert not ending.is_due(80.0)
    assert ending.is_due(95.0)
    ending.reserve_s = 30.0  # measured
    assert ending.is_due(80.0)
    assert not Deadline().is_due(1e9)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_warning_is_no_interruption(number: signal.Signals) -> None:
    """Protects the partial result: only the walltime's warning leaves time for one."""
    ending = Deadline.detect(1000.0, {})
    os.kill(os.getpid(), number)
    warning = number in (signal.SIGUSR1, signal.SIGUSR2)
    assert (ending.warned, ending.interrupted) == (warning, not warning)
    assert ending.is_due() == warning
