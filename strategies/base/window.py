"""Windows of time: updates are gathered, and a window that closes makes a version.

The synchronous round with a deadline, a quorum or a grace is one such window; sites that are
not waited for go on or wait for the next one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from strategies.base.asynchronous import AsyncStrategy
from strategies.engine.state import Failure, Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.blocks import Tensors
from strategies.parts.buffer import Buffer, Update
from strategies.parts.draw import drawn


def check_window(
    *,
    deadline_s: float | None = None,
    quorum: int = 1,
    grace_s: float | None = None,
    exponent: float = 0.0,
) -> None:
    """Refuse settings of a window that make no sense."""
    if deadline_s is not None and not deadline_s > 0.0:  # at 0 it would be due at every moment
        raise ValueError(f"deadline_s={deadline_s} must be greater than 0, or None (no deadline)")
    if quorum < 1:
        raise ValueError(f"quorum={quorum} must be at least 1")
    if grace_s is not None and not grace_s >= 0.0:
        raise ValueError(f"grace_s={grace_s} must be at least 0, or None (no grace)")
    if not exponent >= 0.0:
        raise ValueError(f"exponent={exponent} must be at least 0 (0: staleness does not count)")


class WindowStrategy(AsyncStrategy):
    """Base of strategies that merge what a window of time has gathered.

    Parameters
    ----------
    deadline_s : float or None
        A window closes so long after it was opened (None: when all have reported).
    quorum : int
        A window that has fewer updates at its deadline stays open for another one.
    grace_s : float or None
        With it, a window closes so long after its quorum was reached.
    late : str
        What of an update that comes after its window: ``merge`` it into the next one with
        the staleness weight, or ``drop`` it.
    weighted_by : str
        ``uniform`` or ``num-examples``.
    exponent : float
        a of the staleness weight ``(1 + tau)^-a``.
    **base
        ``average`` and ``size_steps`` with its bounds, see
        `strategies.base.asynchronous.AsyncStrategy`.
    """

    persistent: ClassVar[tuple[str, ...]] = ("working", "_opened", "_failed")
    persistent_times: ClassVar[tuple[str, ...]] = ("_closes_at",)

    def __init__(
        self,
        *,
        deadline_s: float | None = None,
        quorum: int = 1,
        grace_s: float | None = None,
        late: Literal["merge", "drop"] = "merge",
        weighted_by: Literal["num-examples", "uniform"] = "num-examples",
        exponent: float = 0.5,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        limits.one_of("weighted_by", weighted_by, limits.WEIGHTINGS)
        limits.one_of("late", late, ("merge", "drop"))
        check_window(deadline_s=deadline_s, quorum=quorum, grace_s=grace_s, exponent=exponent)
        self.weighted_by = weighted_by
        self.deadline_s = deadline_s
        self.quorum = quorum
        self.grace_s = grace_s
        self.late = late
        self.exponent = exponent
        self.buffer = Buffer()
        self.working: dict[str, int] = {}  # facility -> version it works on in this window
        self._opened = False  # somebody has been asked since the last window closed
        self._failed: list[str] = []  # facilities, in this window
        self._closes_at: float | None = None

    # ---- what a subclass changes ------------------------------------------------------------

    @abstractmethod
    def merge(self, updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
        """Return the next version from a window's updates and their weights."""

    def may_join(self, site: SiteState) -> bool:
        """Return whether a free site takes part in the present window."""
        name, wanted = site.facility, self.selected()
        reported = self.buffer.holds(name, self.version)
        return not reported and (wanted is None or name in self._drawn(wanted))

    def selected(self) -> int | None:
        """Return how many sites are asked for a window, drawn at random; None: all."""
        return None

    def complete(self) -> bool:
        """Return whether nothing is left to wait for.

        What comes late, before anybody was asked to join the window, waits for the window.
        """
        return self._opened and not self.awaited()

    def weight(self, update: Update) -> float:
        """Return an update's weight, before normalisation and staleness."""
        return float(update.examples) if self.weighted_by == "num-examples" else 1.0

    def shares(self, updates: Sequence[Update]) -> list[float]:
        """Return the weights of a window's updates before staleness: they sum to 1."""
        return rules.normalised([self.weight(u) or 1e-12 for u in updates])

    # ---- what it knows ----------------------------------------------------------------------

    def reported(self) -> set[str]:
        """Return who has trained from the present version and is in the window already."""
        return {u.facility for u in self.buffer if u.version == self.version}

    def awaited(self) -> set[str]:
        """Return who works on an order of the present window."""
        return {facility for facility in self.working if self.busy(facility)}

    def _drawn(self, count: int) -> list[str]:
        """Return the free sites that make up the number; the draw is the same after a resume."""
        taking_part = self.awaited() | self.reported()
        free = [
            name
            for name, site in self.sites.items()
            if site.online and name not in taking_part and not (self.busy(name) or self.rests(name))
        ]
        seed = f"{self.runtime.run_key}:{self.version}"
        return drawn(seed, free, count - len(taking_part), last=self._failed)

    def counts(self, result: SiteResult, staleness: int) -> bool:
        """Return whether a result is gathered."""
        return staleness == 0 or self.late == "merge"

    def pending(self) -> list[str]:
        """Return what the last window has left for the next one."""
        return [u.order_id for u in self.buffer]

    def staleness_weight(self, staleness: int) -> float:
        """Return (1 + tau)^-a."""
        return rules.staleness_weight("polynomial", staleness, a=self.exponent)

    # ---- the loop's hooks -------------------------------------------------------------------

    def plan(self, site: SiteState) -> Plan | None:
        """Let a site that has reported wait for the next window."""
        self._opened = True
        if not self.may_join(site):
            return None
        self.working[site.facility] = self.version
        if self._closes_at is None and self.deadline_s is not None:
            self._closes_at = self.now() + self.deadline_s
        return self.order(site)

    def order(self, site: SiteState) -> Plan:
        """Return what a site that takes part is to do."""
        return Plan(self.order_steps(site))

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Gather an update; the last one closes the window."""
        self.working.pop(result.facility, None)
        if self.counts(result, staleness):
            self.buffer.add(self.keep_tensors, result)
        if len(self.buffer) >= self.quorum and self.grace_s is not None:
            closes = self.now() + self.grace_s
            self._closes_at = closes if self._closes_at is None else min(closes, self._closes_at)
        return self._close() if len(self.buffer) and self.complete() else None

    def on_failure(self, failure: Failure) -> None:
        """Wait for a failed site no longer, and rather ask another one."""
        self.working.pop(failure.facility, None)
        self._failed.append(failure.facility)

    def wake_at(self) -> float | None:
        """Return when the window closes: now, if the last one it waited for has failed."""
        if len(self.buffer) and self.complete():
            return self.now()
        return self._closes_at

    def on_wake(self) -> Tensors | None:
        """Close the window; one without a quorum is opened for another deadline."""
        if len(self.buffer) >= self.quorum or (len(self.buffer) and self.complete()):
            return self._close()
        self._closes_at = None if self.deadline_s is None else self.now() + self.deadline_s
        return None

    def _close(self) -> Tensors:
        updates = self.buffer.take()
        self._closes_at = None
        self._opened = False
        self.working.clear()
        self._failed.clear()
        decay = [self.staleness_weight(self.version - u.version) for u in updates]
        both = zip(self.shares(updates), decay, strict=True)
        return self.merge(updates, [w * d for w, d in both])
