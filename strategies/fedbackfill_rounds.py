"""FedBackfill with barriers: windows of a quorum and a grace that adapts to the orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flwr_hpc.protocol import Order
from strategies.base.window import WindowStrategy
from strategies.engine.state import Binding, Plan, SiteResult, SiteState
from strategies.parts import limits
from strategies.parts.balance import ContributionBalance
from strategies.parts.blocks import Tensors
from strategies.parts.buffer import Update, deltas
from strategies.parts.outer import PartialNesterov

NO_WORK = ("queued", "ended")  # states of an allocation in which an order does not go on


class FedBackfillRounds(WindowStrategy):
    """FedBackfill for those who need barriers: a version per window, merged in one step.

    A site joins the window in which its order is submitted: one that waits in a queue holds
    nobody up. A window closes when all who joined have reported, or ``grace R`` seconds after
    its quorum has; what comes later is merged into the next one. The updates of a window make
    one step of `strategies.parts.outer.PartialNesterov` with the weights of FedBackfill::

        rho_k = g_k s(tau_k)
        g_k = 1/N, with the factors of FedBackfill on request
        s(tau) = (1 + tau / N)^-a

    They are not normalised: a window of few sites makes a small step. R is how long an
    order takes from its submission to its arrival without the queue, by moving averages over the
    orders of those who have reported; or `round_s`.

    Parameters
    ----------
    round_s : float or None
        Seconds of training per order (None: five times what an order costs besides).
    min_steps, max_steps : int
        Bounds of an order.
    outer_lr, momentum : float
        eta and beta of the step.
    average : float or None
        gamma of the average that is published; None: the newest version is.
    quorum : int or None
        Reports of its own that a window needs (None: of half of the reachable sites, rounded up);
        never more than there are sites at work on it.
    grace : float
        As a share of R; 0: the quorum closes the window.
    balance, balance_arrivals : bool
        The factors of g_k by steps and by arrivals.
    exponent : float
        a.
    """

    persistent_times = ("_reports",)

    def __init__(
        self,
        *,
        round_s: float | None = None,
        min_steps: int = 10,
        max_steps: int = 4000,
        outer_lr: float = 2.0,
        momentum: float = 0.8,
        average: float | None = 8.0,
        quorum: int | None = None,
        grace: float = 0.33,
        balance: bool = False,
        balance_arrivals: bool = False,
        exponent: float = 0.5,
    ) -> None:
        super().__init__(
            exponent=exponent,
            average=average,
            size_steps=True,
            round_s=round_s,
            min_steps=min_steps,
            max_steps=max_steps,
        )
        if quorum is not None and quorum < 1:
            raise ValueError(f"quorum={quorum} must be at least 1")
        limits.not_negative("grace", grace)
        self.wanted = quorum
        self.grace = grace
        self.balance = balance
        self.balance_arrivals = balance_arrivals
        self.outer = PartialNesterov(outer_lr, momentum)
        self.rates = ContributionBalance()
        self._reports: list[float] = []  # when they came, of the present window

    # ---- who works, and how much --------------------------------------------------------------

    def plan(self, site: SiteState) -> Plan | None:
        """Return an order for a site that has not reported yet."""
        plan = super().plan(site)
        if plan is not None:  # it may have to queue: it joins when the order is submitted
            del self.working[site.facility]
        return plan

    def order(self, site: SiteState) -> Plan:
        """Return an order that fits the site's speed and what is left of its walltime."""
        return Plan(self.order_steps(site), bind=self._joining(site.facility))

    def _joining(self, facility: str) -> Callable[[Order | None], Binding]:
        def bind(running: Order | None) -> Binding:
            self.working[facility] = self.version
            return Binding(self.version, self.arrays)

        return bind

    # ---- when a window closes -----------------------------------------------------------------

    def needed(self) -> int:
        """Return the quorum of the present window, as things are now."""
        wanted = math.ceil(self.num_sites / 2) if self.wanted is None else self.wanted
        at_work = {name for name in self.awaited() if self._at_work(name)}
        return max(1, min(wanted, len(self.reported() | at_work)))

    def _at_work(self, facility: str) -> bool:
        """Return whether an order goes on there, for all that is known."""
        site = self.sites.get(facility)
        return site is not None and site.online and site.allocation_state not in NO_WORK

    def duration_s(self) -> float:
        """Return R; at least one site has reported."""
        if self.sizing.round_s is not None:
            return self.sizing.round_s
        took = [self._order_s(name) for name in self.reported()]
        return sum(took) / len(took)

    def _order_s(self, facility: str) -> float:
        pace = self.pace
        return (
            pace.overhead_s.get(facility, 0.0) + pace.step_s[facility] * self.rates.steps[facility]
        )

    def wake_at(self) -> float | None:
        """Return when the window closes: its quorum may shrink with the sites at work."""
        needed = self.needed()
        made = len(self._reports) >= needed
        self._closes_at = (
            self._reports[needed - 1] + self.grace * self.duration_s() if made else None
        )
        return super().wake_at()

    # ---- what is merged -----------------------------------------------------------------------

    def staleness_weight(self, staleness: int) -> float:
        """Return (1 + tau / N)^-a."""
        return float((1.0 + staleness / self.num_sites) ** -self.exponent)

    def weight(self, update: Update) -> float:
        """Return g_k."""
        factors = (self.balance, self.balance_arrivals)
        return self.rates.share(update.facility, self.num_sites, *factors)

    def shares(self, updates: Sequence[Update]) -> list[float]:
        """Return every g_k as it is: a window of a part of the sites is a part of a step."""
        return [self.weight(u) for u in updates]

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Gather an update; the last one at work closes the window."""
        if self.counts(result, staleness):
            self.rates.observe(result.facility, result.steps, self.num_sites)
            if staleness == 0:
                self._reports.append(self.now())
        return super().on_result(result, staleness)

    def merge(self, updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
        """Take one step along the sum of the pseudo-gradients."""
        self._reports = []
        found = deltas(updates)
        self.averaged(found, weights)
        return self.outer.step(self.keep_tensors, self.arrays, found, weights)

    def version_weight(self, updates: int) -> float:
        """Return the sum of all rho_k."""
        return self.outer.rho
