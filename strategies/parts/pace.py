"""How fast a site is, by what its orders took."""

from __future__ import annotations

from strategies.engine.state import SiteResult


class SpeedEstimate:
    """Moving averages per facility: seconds per step, queue wait, and what an order costs besides.

    Compute, transfer and queue are kept apart; each comes from one host's clock.

    Parameters
    ----------
    momentum : float
        Share of the old average that an observation leaves.
    queue_s : float or None
        What the average wait begins with; None: with the first one.

    Attributes
    ----------
    step_s, queue_s, overhead_s : dict of str to float
        By facility: of one step; in the queue for one order; of an order, above its training
        (transfer, messages, start-up of the site's process).
    queued_s : dict of str to float
        In the queue with no allocation running, by the last arrival, in all.
    """

    persistent = ("step_s", "queue_s", "overhead_s", "queued_s")

    def __init__(self, momentum: float = 0.5, queue_s: float | None = None) -> None:
        self.momentum = momentum
        self._first_queue_s = queue_s
        self.step_s: dict[str, float] = {}
        self.queue_s: dict[str, float] = {}
        self.overhead_s: dict[str, float] = {}
        self.queued_s: dict[str, float] = {}

    def observe(self, result: SiteResult, *, ahead: bool = False) -> None:
        """Take an arrival's times in; of an order that was submitted `ahead`, not what it cost.

        Such an order has waited at the site for the one before it; of one that was resumed, the
        beginning is not known.
        """
        facility, steps, train_s = result.facility, result.steps, result.train_s
        if train_s is None:  # an ordinary ClientApp tells nothing
            train_s = result.took_s
        if steps > 0:
            self._blend(self.step_s, facility, train_s / steps)
        waited = self.waited_s(result)
        if not (ahead or result.resumed):
            extra = self._besides(facility, max(0.0, result.took_s - train_s), waited)
            self._blend(self.overhead_s, facility, extra)
        self._blend(self.queue_s, facility, waited, self._first_queue_s)
        self.queued_s[facility] = result.queued_s

    def _besides(self, facility: str, extra: float, waited: float) -> float:
        """Return what an order cost above its training, without the queue's part of it.

        A wait before the submission is no part of `extra`; one after it (a preemption, an
        allocation that ended) is, unless some of it had passed before. Where that cannot be told
        the order is taken to have cost no more than those before it.
        """
        if extra >= waited:
            return extra - waited
        return min(extra, self.overhead_s.get(facility, extra))

    def waited_s(self, result: SiteResult) -> float:
        """Return the seconds in the queue since the facility's arrival before this one."""
        return max(0.0, result.queued_s - self.queued_s.get(result.facility, 0.0))

    def _blend(
        self, table: dict[str, float], facility: str, value: float, first: float | None = None
    ) -> None:
        old = table.get(facility, first)
        keep = self.momentum
        table[facility] = value if old is None else keep * old + (1.0 - keep) * value
