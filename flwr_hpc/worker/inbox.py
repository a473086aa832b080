"""Which order an allocation takes next, and when it ends."""

from __future__ import annotations

from collections.abc import Callable

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.spool import AllocationDir, Spool

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.5


class Inbox:
    """Waits for orders in the allocation's folder.

    Parameters
    ----------
    allocation : AllocationDir
    spool : Spool
    idle_timeout_s : float
    should_stop : callable
        True once a signal came or the walltime is about over.
    clock : Clock
    """

    def __init__(
        self,
        allocation: AllocationDir,
        spool: Spool,
        idle_timeout_s: float,
        should_stop: Callable[[], bool],
        clock: Clock | None = None,
    ) -> None:
        self._allocation = allocation
        self._spool = spool
        self._idle_timeout_s = idle_timeout_s
        self._should_stop = should_stop
        self._clock = clock or SystemClock()
        self._done: set[str] = set()

    def next(self) -> str | None:
        """Return the id of the next order without a result, or None when it is time to end."""
        began = self._clock.now()
        pause = FIRST_PAUSE_S
        while not self._should_stop():
            # Before the inbox: an order assigned ahead of the release is still done.
            released = self._allocation.released
            if order_id := self._assigned():
                return order_id
            if released or self._clock.now() - began >= self._idle_timeout_s:
                return None
            self._clock.sleep(pause)
            pause = min(1.2 * pause, LONGEST_PAUSE_S)
        return None

    def answered(self, order_id: str) -> None:
        """Leave out an order whose result is about to be written."""
        self._done.add(order_id)

    def _assigned(self) -> str | None:
        for order_id in self._allocation.inbox():
            if order_id in self._done:
                continue
            order = self._spool.order(order_id)
            if order.result() is not None:
                self._done.add(order_id)
            elif order.exists:  # else it is settled, and just being removed with its result
                return order_id
        return None
