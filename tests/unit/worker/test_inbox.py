"""Which order an allocation takes next, and when it ends; time is injected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from worlds.clock import FakeClock

from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import AllocationDir, Spool
from flwr_hpc.worker.inbox import Inbox


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path)


def assign(spool: Spool, seq: int) -> None:
    """Publish an order and assign it, as the launcher does."""
    order = Order("run", "a", seq, "train")
    spool.order(order.id).write_order(order, None)
    allocation(spool).assign(order.id)


def inbox(spool: Spool, clock: FakeClock, should_stop: Callable[[], bool] = lambda: False) -> Inbox:
    return Inbox(allocation(spool), spool, 100.0, should_stop, clock)


def allocation(spool: Spool) -> AllocationDir:
    return spool.allocation("job")


def test_orders_come_by_sequence_and_once(spool: Spool, clock: FakeClock) -> None:
    """An order with a result, by whomever, is not carried out again."""
    box = inbox(spool, clock)
    for seq in (2, 0, 1):
        assign(spool, seq)
    spool.order("run-a-000000").write_result(Result("run-a-000000", "done"))
    assert box.next() == "run-a-000001"
    assert box.next() == "run-a-000001"  # until it has a result
    spool.order("run-a-000001").write_result(Result("run-a-000001", "failed"))
    assert box.next() == "run-a-000002"
    assert not clock.pauses


def test_polling_backs_off_and_notices_soon(spool: Spool, clock: FakeClock) -> None:
    """Short pauses at first for warm orders; never longer than half a second."""
    clock.at[60.0] = lambda: assign(spool, 0)
    assert inbox(spool, clock).next() == "run-a-000000"
    assert clock.pauses[0] == 0.05
    assert max(clock.pauses) == 0.5
    assert clock.time < 60.6


def test_release_ends_after_what_was_assigned(spool: Spool, clock: FakeClock) -> None:
    """An order handed in before the release is still carried out."""
    box = inbox(spool, clock)
    assign(spool, 0)
    allocation(spool).release()
    assert box.next() == "run-a-000000"
    spool.order("run-a-000000").write_result(Result("run-a-000000", "done"))
    assert box.next() is None


def test_an_order_assigned_just_before_the_release_is_done(
    spool: Spool, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round's order and its release may both come between two looks at the folder."""
    look = AllocationDir.inbox

    def inbox_before_both(alloc: AllocationDir) -> list[str]:
        found = look(alloc)
        assign(spool, 0)
        alloc.release()
        return found

    monkeypatch.setattr(AllocationDir, "inbox", inbox_before_both)
    assert inbox(spool, clock).next() == "run-a-000000"


def test_idle_timeout_counts_from_the_last_order(spool: Spool, clock: FakeClock) -> None:
    """Every wait starts anew."""
    box = inbox(spool, clock)
    assert box.next() is None
    assert clock.time == pytest.approx(100.0, abs=0.6)
    clock.at[190.0] = lambda: assign(spool, 0)
    assert box.next() == "run-a-000000"


def test_end_of_walltime_or_a_signal_wins(spool: Spool, clock: FakeClock) -> None:
    """No order is begun that could not be finished."""
    assign(spool, 0)
    assert inbox(spool, clock, should_stop=lambda: True).next() is None


def test_a_settled_order_that_is_just_removed_is_not_taken(spool: Spool, clock: FakeClock) -> None:
    """Protects a job that was requeued, and from training twice what the server has taken."""
    box = inbox(spool, clock)
    assign(spool, 0)
    assign(spool, 1)
    spool.order("run-a-000000").remove()
    assert box.next() == "run-a-000001"
