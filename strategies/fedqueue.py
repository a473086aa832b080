"""FedQueue: rounds whose work leaves room for the expected wait in the queue."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.base.window import WindowStrategy
from strategies.engine.state import Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.blocks import Tensors
from strategies.parts.buffer import Update, deltas
from strategies.parts.pace import SpeedEstimate


class FedQueue(WindowStrategy):
    """FedQueue (arXiv 2605.02125): scheduler-aware rounds of fixed length.

    With the forecast wait ``q <- b q_seen + (1 - b) q`` a site gets ``max(0.5, T - q - margin)``
    seconds of work, ``E = max(floor(J / s), min_steps)`` steps at its speed s, and its learning
    rate is scaled by ``E_min / E``. A job that waited no longer than ``q + tolerance T`` is
    merged in its round, any other in the next one with a staleness weight; its site has no work
    until then. A round ends when every site has come, or by its timer.

    A job's wait is the time in the queue during which its site had no allocation: a successor
    that queues while its predecessor trains keeps nobody waiting. E_min is the least of the sites
    that have reported before.

    Parameters
    ----------
    round_s : float
        T.
    margin_s : float
        Kept back of each round for transfers.
    momentum : float
        b.
    q_init : float or None
        q ahead of a site's first report. None: the first wait is the forecast, and not late.
    min_steps, max_steps : int
    tolerance : float
        Of the admission, as a share of T.
    timer : float
        A round ends after so many T.
    scale_lr : bool
        Scale the sites' learning rates by ``E_min / E``.
    staleness : str
        s(u), see `strategies.parts.rules.staleness_rule`.
    a, b : float or None
        Its parameters; None: their defaults.
    renormalise : bool
        False: an update weighs ``n_k / n s(u)``, so that stale ones shorten the step. True: these
        weights are divided by their sum.
    average : float or None
        See `strategies.base.asynchronous.AsyncStrategy`. Orders are sized here already.
    """

    persistent = ("_held",)

    def __init__(
        self,
        *,
        round_s: float = 3600.0,
        margin_s: float = 60.0,
        momentum: float = 0.5,
        q_init: float | None = 2.0,
        min_steps: int = 20,
        max_steps: int = 100_000,
        tolerance: float = 0.2,
        timer: float = 1.15,
        scale_lr: bool = True,
        staleness: str = "polynomial",
        a: float | None = None,
        b: float | None = None,
        renormalise: bool = False,
        average: float | None = None,
    ) -> None:
        limits.positive("round_s", round_s)
        limits.positive("timer", timer)
        limits.not_negative("margin_s", margin_s)
        limits.not_negative("tolerance", tolerance)
        limits.not_negative("q_init", q_init)
        limits.steps(min_steps, max_steps)
        limits.positive_share("momentum", momentum)  # 1: the last wait is the forecast
        super().__init__(deadline_s=timer * round_s, late="merge", average=average)
        self.round_s = round_s
        self.margin_s = margin_s
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.tolerance = tolerance
        self.scale_lr = scale_lr
        self.q_init = q_init
        self.renormalise = renormalise
        self._decay = rules.staleness_rule(staleness, a=a, b=b)
        self.pace = SpeedEstimate(1.0 - momentum, queue_s=q_init)
        self._held: list[str] = []  # facilities whose update waits for the next round

    def staleness_weight(self, staleness: int) -> float:
        """Return s(u)."""
        return self._decay(staleness)

    def may_join(self, site: SiteState) -> bool:
        """Let a site whose update has not been merged yet wait for that."""
        return super().may_join(site) and not self.buffer.holds(site.facility)

    def order(self, site: SiteState) -> Plan:
        """Return as many steps as the round has room for."""
        steps = self._steps(site.facility)
        return Plan(steps, {"lr-scale": self._least(steps) / steps} if self.scale_lr else {})

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Merge an update now if its job started as forecast, else in the next round."""
        expected, waited = self._forecast(result.facility), self.pace.waited_s(result)
        self.pace.observe(result)
        late = expected is not None and waited > expected + self.tolerance * self.round_s
        if late and staleness == 0:
            self._held.append(result.facility)
        return super().on_result(result, staleness)

    def merge(self, updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
        """Step along the weighted mean of what is admitted."""
        found = deltas(updates)
        self.averaged(found, weights)
        weights = rules.normalised(weights) if self.renormalise else weights
        return rules.weighted_step(self.arrays, found, weights)

    def admitted(self) -> list[Update]:
        """Return the updates of the present window that are merged when it closes."""
        return [u for u in self.buffer if u.facility not in self._held or u.version < self.version]

    def _close(self) -> Tensors:
        admitted = {u.order_id for u in self.admitted()}
        held = [u for u in self.buffer if u.order_id not in admitted] if admitted else []
        self.buffer.replace([u for u in self.buffer if u not in held])
        stragglers = dict(self.working)  # the next round waits for them, too
        new = super()._close()
        self.buffer.replace(held)
        self.working = stragglers
        self._held = []
        return new

    def _forecast(self, facility: str) -> float | None:
        return self.pace.queue_s.get(facility, self.q_init)

    def _steps(self, facility: str) -> int:
        speed = self.pace.step_s.get(facility)
        if speed is None or speed <= 0:
            return self.min_steps
        work_s = max(0.5, self.round_s - (self._forecast(facility) or 0.0) - self.margin_s)
        return min(self.max_steps, max(int(work_s / speed), self.min_steps))

    def _least(self, own: int) -> int:
        """Return the least work of the sites that take part and whose speed is known.

        One that has not reported yet, or is long gone, scales nobody's rate.
        """
        here = [name for name, site in self.sites.items() if site.online or self.busy(name)]
        return min([own, *(self._steps(name) for name in here if self.pace.step_s.get(name))])
