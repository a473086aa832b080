"""Asynchronous DiLoCo: delayed Nesterov momentum and dynamic local steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from strategies.base.asynchronous import AsyncStrategy
from strategies.base.fields import StoredTensors
from strategies.engine.state import Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.blocks import Tensor, Tensors, blockwise
from strategies.parts.lora import adapters
from strategies.parts.pace import SpeedEstimate
from strategies.parts.rules import Record


class AsyncDiLoCo(AsyncStrategy):
    """Delayed Nesterov with dynamic local updates (arXiv 2401.09135).

    Every arrival steps ``theta <- theta - eta delta / N`` and adds to ``S``; every N-th also
    ``m <- beta m + S / N``, ``theta <- theta - eta beta m``, ``S <- 0``. N = 1 is Nesterov.
    Sites train ``H_k = max(1, floor(v_k / v_max H))`` steps at their speed v_k.

    Parameters
    ----------
    delay : int or None
        N (None: the number of sites).
    outer_lr, momentum : float
        eta and beta.
    nesterov : bool
        Else momentum is plain: every N-th result steps ``theta <- theta - eta beta m`` ahead of
        ``m <- beta m + S / N``, so that N of them make ``theta - eta m``. Not in the paper.
    dynamic_steps : bool
        Size the orders by speed, as the paper does; else every order has H steps. `size_steps`
        takes the place of both.
    steps : int
        H of the fastest site (0: as configured).
    staleness_exponent : float
        0 is the paper's; above, stale updates count less.
    **base
        ``average`` and ``size_steps`` with its bounds, see
        `strategies.base.asynchronous.AsyncStrategy`.
    """

    persistent = ("_arrived", "_sum", "_m")

    def __init__(
        self,
        *,
        delay: int | None = None,
        outer_lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        dynamic_steps: bool = True,
        steps: int = 0,
        staleness_exponent: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if delay is not None and delay < 1:
            raise ValueError(f"delay={delay} must be at least 1")
        limits.positive("outer_lr", outer_lr)
        limits.share("momentum", momentum)
        limits.not_negative("steps", steps)
        limits.not_negative("staleness_exponent", staleness_exponent)
        self.delay = delay
        self.outer_lr = outer_lr
        self.momentum = momentum
        self.nesterov = nesterov
        self.dynamic_steps = dynamic_steps
        self.steps = steps
        self.staleness_exponent = staleness_exponent
        self.pace = SpeedEstimate(0.5)
        self._arrived = 0  # since the last delayed step
        self._sum: StoredTensors | None = None
        self._m: StoredTensors | None = None

    def models_kept(self, sites: int) -> int:
        """Return those of its parts, and the sum and the momentum, each once more when replaced."""
        return super().models_kept(sites) + 4

    def plan(self, site: SiteState) -> Plan:
        """Return fewer steps for a slower site."""
        if self.size_steps:
            return Plan(self.order_steps(site))
        steps = self.steps or self.default_steps
        mine = self.pace.step_s.get(site.facility)
        if not (self.dynamic_steps and mine):
            return Plan(steps)
        return Plan(max(1, int(min(self.pace.step_s.values()) / mine * steps)))

    def staleness_weight(self, staleness: int) -> float:
        """Return (1 + tau)^-a."""
        return rules.staleness_weight("polynomial", staleness, a=self.staleness_exponent)

    def observe(self, result: SiteResult) -> None:
        """Learn how fast a site is."""
        self.pace.observe(result)

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Step at once; the momentum's part every N-th time."""
        assert result.base is not None
        assert result.arrays is not None
        self._arrived += 1
        weight = self.staleness_weight(staleness)
        total = self.keep_tensors("sum", self._summed(result.base, result.arrays, weight))
        period = self.delay or self.num_sites
        scale = self.outer_lr * weight / period
        delta = adapters.difference(result.base, result.arrays)
        self.combined = adapters.step_of(self.arrays, [delta], [weight / period])
        if self._arrived < period:
            self._sum = total
            return _stepped(self.arrays, result.base, result.arrays, scale, None, 0.0)
        before, self._m = self._m, self.keep_tensors("momentum", self._momenta(total, period))
        self._sum, self._arrived = None, 0
        pull, m = self.outer_lr * self.momentum, self._m if self.nesterov else before
        return _stepped(self.arrays, result.base, result.arrays, scale, m, pull)

    def _summed(self, base: Record, trained: Record, weight: float) -> Tensors:
        def rule(start: Tensor, end: Tensor, before: Tensor | None = None) -> Tensor:
            delta = rules.pseudo_gradient(start, end)
            delta = delta.dtype.type(weight) * delta
            return delta if before is None else np.asarray(before + delta)

        for name, array in base.items():
            before = [] if self._sum is None else [self._sum[name]]
            yield name, blockwise(rule, array, trained[name], *before)

    def _momenta(self, total: Record, period: int) -> Tensors:
        def rule(whole: Tensor, before: Tensor | None = None) -> Tensor:
            mean = np.asarray(whole / whole.dtype.type(period))
            return rules.momentum_step(before, mean, self.momentum)

        for name, array in total.items():
            before = [] if self._m is None else [self._m[name]]
            yield name, blockwise(rule, array, *before)


def _stepped(
    theta: Record, base: Record, trained: Record, scale: float, momentum: Record | None, pull: float
) -> Tensors:
    """Yield ``theta - scale delta - pull m``."""

    def rule(here: Tensor, start: Tensor, end: Tensor, m: Tensor | None = None) -> Tensor:
        delta = rules.pseudo_gradient(start, end)
        direction = delta.dtype.type(scale) * delta
        if m is not None:
            direction = direction + direction.dtype.type(pull) * m
        return rules.descend(here, direction)

    for name, array in theta.items():
        m = [] if momentum is None else [momentum[name]]
        yield name, blockwise(rule, array, base[name], trained[name], *m)
