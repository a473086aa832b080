"""FedBackfill: fill every gap that the batch queues leave."""

from __future__ import annotations

from collections.abc import Callable

from flwr_hpc.protocol import LOCAL_UPDATE_SHARE, Order
from strategies.base.asynchronous import AsyncStrategy
from strategies.base.fields import StoredTensors
from strategies.engine.state import Binding, Failure, Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.balance import ContributionBalance
from strategies.parts.blocks import Tensor, Tensors, blockwise
from strategies.parts.outer import PartialNesterov


class FedBackfill(AsyncStrategy):
    """Asynchronous training by whoever holds an allocation; an average is published.

    A site trains all the time it holds an allocation, in orders of about `round_s` seconds that
    fit into what is left of the walltime. Every arrival makes a version::

        rho   = g_k s(tau)
        m     <- beta^rho m + rho delta_k
        theta <- theta - eta rho (delta_k + beta m)
        g_k = 1/N
        s(tau) = (1 + tau / N)^-a

    What is published is an average of the versions (`strategies.parts.average`): it
    takes out the noise that steps as large as these bring in. A site that is eight times faster,
    or whose queue is shorter, contributes more; what it pulls to its own data has not been worth
    the noise of balancing it (`benchmarks/README.md`), which two factors of g_k do on request:
    ``clip(sqrt(n_mean / n_k))`` and ``clip(1/N / f_k)``, with n_k the site's steps per order, f_k
    its share of the arrivals, clipped to [1/3, 3].

    Parameters
    ----------
    round_s : float or None
        Seconds of training per order (None: five times what an order costs besides).
    min_steps, max_steps : int
        Bounds of an order.
    outer_lr, momentum : float
        eta and beta of a Nesterov step scaled by participation rho (beta = 0: a plain step).
    average : float or None
        gamma of the average that is published; None: the newest version is.
    size_steps : bool
        Size orders by speed and walltime; else every order has the configured steps.
    balance, balance_arrivals : bool
        The factors of g_k by steps and by arrivals.
    exponent : float
        a.
    late_binding : bool
        A site trains on the weights that are newest when it has an allocation; else on those
        that were when it was asked to queue.
    overlap : bool
        The next order waits at the site while one is trained, so that transfers cost no time;
        it starts from the newest weights plus the expected share of the update in flight. When
        it is submitted depends on the clock: a resumed run loses nothing, but is not the same bit
        for bit.
    """

    persistent = ("_last", "_bound")

    def __init__(
        self,
        *,
        round_s: float | None = None,
        min_steps: int = 10,
        max_steps: int = 4000,
        outer_lr: float = 2.0,
        momentum: float = 0.8,
        average: float | None = 8.0,
        size_steps: bool = True,
        balance: bool = False,
        balance_arrivals: bool = False,
        exponent: float = 0.5,
        late_binding: bool = True,
        overlap: bool = False,
    ) -> None:
        super().__init__(
            average=average,
            size_steps=size_steps,
            round_s=round_s,
            min_steps=min_steps,
            max_steps=max_steps,
        )
        limits.not_negative("exponent", exponent)
        self.outer = PartialNesterov(outer_lr, momentum)
        self.balance = balance
        self.balance_arrivals = balance_arrivals
        self.exponent = exponent
        self.late_binding = late_binding
        self.overlap = overlap
        self.rates = ContributionBalance()
        # Facility -> the number of its last order, and its pseudo-gradient.
        self._last: dict[str, tuple[int, StoredTensors]] = {}
        # Facility -> the version that it is to train on.
        self._bound: dict[str, tuple[int, StoredTensors]] = {}

    def models_kept(self, sites: int) -> int:
        """Return those of its parts, the update at hand, and what it keeps of each site."""
        own = sites * (int(self.overlap) + int(not self.late_binding))
        return super().models_kept(sites) + 1 + own

    # ---- how much work ----------------------------------------------------------------------

    def plan(self, site: SiteState) -> Plan:
        """Return an order that fits the site's speed and what is left of its walltime."""
        steps = self.order_steps(site)
        if not self.late_binding:
            return Plan(steps, bind=self._bind_now(site.facility))
        step_s = self.pace.step_s.get(site.facility)
        if not self.overlap:
            return Plan(steps)
        options = {LOCAL_UPDATE_SHARE: 0.0}  # the site remembers this update for the order after it
        if not step_s:
            return Plan(steps, options)
        # Handed in as late as possible, so that its weights are as new as possible.
        lead = 1.2 * self.pace.overhead_s.get(site.facility, 0.0)
        after_s = max(0.0, (steps or self.default_steps) * step_s - lead)
        return Plan(steps, options, after_s)

    def plan_next(self, site: SiteState) -> Plan:
        """Return the next order, which starts where the site's own update will lead."""
        now = self.plan(site)
        share = self.outer.lr * self.share(site.facility)
        return Plan(now.steps, {LOCAL_UPDATE_SHARE: share}, now.prefetch_after_s)

    def _bind_now(self, facility: str) -> Callable[[Order | None], Binding]:
        version, weights = self._bound.setdefault(facility, (self.version, self.newest()))
        return lambda running: Binding(version, weights.arrays)

    # ---- how much it counts -----------------------------------------------------------------

    def staleness_weight(self, staleness: int) -> float:
        """Return (1 + tau / N)^-a."""
        return float((1.0 + staleness / self.num_sites) ** -self.exponent)

    def share(self, facility: str) -> float:
        """Return g_k."""
        factors = (self.balance, self.balance_arrivals)
        return self.rates.share(facility, self.num_sites, *factors)

    def counts(self, result: SiteResult, staleness: int) -> bool:
        """Return whether it is known from which weights the site has trained."""
        if not result.metrics.get("local_update_share"):
            return True
        last = self._last.get(result.facility)  # lost with a server that died, maybe
        return last is not None and last[0] == int(result.metrics.get("local_update_seq", -1))

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Step along the site's pseudo-gradient."""
        facility = result.facility
        self._bound.pop(facility, None)
        if not self.counts(result, staleness):
            return None
        self.rates.observe(facility, result.steps, self.num_sites)
        delta = self.keep_tensors("delta", self._delta(result))
        if self.overlap:
            self._last[facility] = result.order.seq, delta
        rho = self.share(facility) * self.staleness_weight(staleness)
        self.averaged([delta], [rho])
        return self.outer.step(self.keep_tensors, self.arrays, [delta], [rho])

    def on_failure(self, failure: Failure) -> None:
        """Forget what a site that gave up was to train on."""
        self._bound.pop(failure.facility, None)

    def observe(self, result: SiteResult) -> None:
        """Learn how fast a site is; the `overlap` needs it, too."""
        self.pace.observe(result, ahead=bool(result.order.options.get(LOCAL_UPDATE_SHARE)))

    def version_weight(self, updates: int) -> float:
        """Return rho."""
        return self.outer.rho

    def _delta(self, result: SiteResult) -> Tensors:
        """Yield the pseudo-gradient against the weights the site really started from."""
        assert result.base is not None
        assert result.arrays is not None
        share = result.metrics.get("local_update_share", 0.0)
        last = self._last.get(result.facility)
        before = last[1] if share and last else None

        def rule(delta: Tensor, former: Tensor) -> Tensor:
            return rules.descend(delta, former, share)

        for name, delta in rules.record_delta(result.base, result.arrays):
            yield name, delta if before is None else blockwise(rule, delta, before[name])
