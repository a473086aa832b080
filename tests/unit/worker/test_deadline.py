"""When a worker stops: the walltime, by whichever clock tells it, and the scheduler's signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from worlds.clock import FakeClock

from flwr_hpc.worker.deadline import Deadline, Stop

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1000.0, epoch=1e9)


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> Iterator[None]:
    monkeypatch.setenv("FLWR_HPC_T0", str(clock.now()))  # the job begins now
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
    clock: FakeClock,
    asked: float | None,
    granted: str | None,
    end_in: float | None,
    left: float | None,
) -> None:
    """Protects the result from a walltime that ends before the worker thinks it does."""
    env = {"FLWR_HPC_WALLTIME_S": granted or "", "FLWR_HPC_END_S": ""}
    if end_in is not None:
        env["FLWR_HPC_END_S"] = f"{clock.wall() + end_in:.0f}"
    found = Deadline.detect(asked, env, clock=clock).walltime_left()
    assert found == (None if left is None else pytest.approx(left, abs=1.0))


def test_time_to_write_is_kept(clock: FakeClock) -> None:
    """Protects the writing of a result: the last step is the one that leaves time for it."""
    deadline = Deadline.detect(100.0, {}, clock=clock)
    assert deadline.reserve_s == 10.0
    assert Deadline.detect(100.0, {}, reserve_most_s=4.0, clock=clock).reserve_s == 4.0
    assert deadline.should_stop(80.0) is Stop.NO
    assert deadline.should_stop(95.0) is Stop.FINISH
    deadline.reserve_s = 30.0  # measured
    assert deadline.should_stop(80.0) is Stop.FINISH
    assert not Deadline(clock=clock).should_stop(1e9)


def test_what_outlasts_the_walltime_is_left(clock: FakeClock) -> None:
    """Protects the orderly end from a message of any length: half of the reserve is for leaving."""
    deadline = Deadline.detect(100.0, {}, clock=clock)
    clock.sleep(94.0)
    assert (deadline.should_stop(), deadline.must_leave()) == (Stop.FINISH, False)
    clock.sleep(2.0)
    assert (deadline.should_stop(), deadline.must_leave()) == (Stop.FINISH, True)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_warning_is_no_interruption(clock: FakeClock, number: signal.Signals) -> None:
    """Protects the partial result: only the walltime's warning leaves time for one."""
    deadline = Deadline.detect(1000.0, {}, clock=clock)
    os.kill(os.getpid(), number)
    warning = number in (signal.SIGUSR1, signal.SIGUSR2)
    assert (deadline.warned, deadline.interrupted) == (warning, not warning)
    assert deadline.should_stop() is (Stop.FINISH if warning else Stop.LEAVE)
    assert deadline.must_leave() is not warning
