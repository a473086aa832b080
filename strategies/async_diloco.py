"""Asynchronous DiLoCo: delayed Nesterov momentum and dynamic local steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord

from strategies.base.asynchronous import AsyncStrategy
from strategies.engine.state import Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.pace import SpeedEstimate
from strategies.parts.rules import Record, Tensors


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
    dynamic_steps : bool
        Size the orders by speed; else every order has H steps.
    steps : int
        H of the fastest site (0: as configured).
    staleness_exponent : float
        0 is the paper's; above, stale updates count less.
    """

    def __init__(
        self,
        *,
        delay: int | None = None,
        outer_lr: float = 0.7,
        momentum: float = 0.9,
        dynamic_steps: bool = True,
        steps: int = 0,
        staleness_exponent: float = 0.0,
    ) -> None:
        super().__init__()
        if delay is not None and delay < 1:
            raise ValueError(f"delay={delay} must be at least 1")
        limits.positive("outer_lr", outer_lr)
        limits.share("momentum", momentum)
        limits.not_negative("steps", steps)
        limits.not_negative("staleness_exponent", staleness_exponent)
        self.delay = delay
        self.outer_lr = outer_lr
        self.momentum = momentum
        self.dynamic_steps = dynamic_steps
        self.steps = steps
        self.staleness_exponent = staleness_exponent
        self.pace = SpeedEstimate(0.5)
        self._arrived = 0  # since the last delayed step
        self._sum: tuple[str, ArrayRecord] | None = None
        self._m: tuple[str, ArrayRecord] | None = None

    def plan(self, site: SiteState) -> Plan:
        """Return fewer steps for a slower site."""
        steps = self.steps or self.default_steps
        mine = self.pace.step_s.get(site.facility)
        if not (self.dynamic_steps and mine):
            return Plan(steps)
        return Plan(max(1, int(min(self.pace.step_s.values()) / mine * steps)))

    def staleness_weight(self, staleness: int) -> float:
        """Return (1 + tau)^-a."""
        return rules.staleness_weight("polynomial", staleness, a=self.staleness_exponent)

    def counts(self, arrival: SiteResult, staleness: int) -> bool:
        """Return whether the site has trained at all."""
        return not arrival.empty

    def on_result(self, arrival: SiteResult, staleness: int) -> Tensors | None:
        """Step at once; the momentum's part every N-th time."""
        if not self.counts(arrival, staleness):
            return None
        assert arrival.base is not None
        assert arrival.arrays is not None
        self.pace.observe(arrival)
        self._arrived += 1
        version, store = self.version + 1, self.runtime.checkpoints
        weight = self.staleness_weight(staleness)
        name = f"sum-{version}"
        total = store.put(name, self._summed(arrival.base, arrival.arrays, weight))
        period = self.delay or max(1, len(self.sites))
        scale = self.outer_lr * weight / period
        if self._arrived < period:
            self._sum = name, total
            return _stepped(self.arrays, arrival.base, arrival.arrays, scale, None, 0.0)
        name = f"momentum-{version}"
        self._m = name, store.put(name, self._momenta(total, period))
        self._sum, self._arrived = None, 0
        pull = self.outer_lr * self.momentum
        return _stepped(self.arrays, arrival.base, arrival.arrays, scale, self._m[1], pull)

    def _summed(self, base: Record, trained: Record, weight: float) -> Tensors:
        for name, delta in rules.record_delta(base, trained):
            delta = delta.dtype.type(weight) * delta
            yield name, delta if self._sum is None else self._sum[1][name].numpy() + delta

    def _momenta(self, total: Record, period: int) -> Tensors:
        for name, array in total.items():
            mean = array.numpy() / array.numpy().dtype.type(period)
            before = None if self._m is None else self._m[1][name].numpy()
            yield name, rules.momentum_step(before, mean, self.momentum)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of S and m, and how many arrivals S holds."""
        names = {"sum": self._sum, "momentum": self._m}
        return {
            "tensors": [held[0] for held in names.values() if held],
            **{key: held[0] if held else "" for key, held in names.items()},
            "arrived": self._arrived,
            "pace": self.pace.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        get = self.runtime.checkpoints.get
        self._sum = (state["sum"], get(state["sum"])) if state["sum"] else None
        self._m = (state["momentum"], get(state["momentum"])) if state["momentum"] else None
        self._arrived = int(state["arrived"])
        self.pace.load_state_dict(state["pace"])


def _stepped(
    theta: Record, base: Record, trained: Record, scale: float, m: Record | None, pull: float
) -> Tensors:
    """Yield ``theta - scale delta - pull m``."""
    for (name, delta), array in zip(rules.record_delta(base, trained), theta.values(), strict=True):
        direction = delta.dtype.type(scale) * delta
        if m is not None:
            direction = direction + direction.dtype.type(pull) * m[name].numpy()
        yield name, rules.descend(array.numpy(), direction)
