"""FedBackfill: fill every gap the batch queues leave, and let no site own the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord

from strategies import rules
from strategies.asynchronous import AsyncStrategy
from strategies.pace import Pace
from strategies.rules import Record, Tensors
from strategies.sites import Arrival, Plan, Site

__all__ = ["FedBackfill"]

LEAST_STEPS = 5  # below that an order is not worth its transfer


class FedBackfill(AsyncStrategy):
    """Asynchronous training by whoever holds an allocation, with balanced weights.

    A site trains all the time it holds an allocation, in orders of about `round_s` seconds that
    fit into what is left of the walltime. Every arrival makes a version::

        rho   = g_k s(tau)
        m     <- beta^rho m + rho delta_k
        theta <- theta - eta rho (delta_k + beta m)
        g_k = 1/N sqrt(n_mean / n_k) clip(1/N / f_k, 1/3, 3)
        s(tau) = (1 + tau / N)^-a

    with n_k the site's steps per order and f_k its share of the arrivals, so that a site that is
    eight times faster, or whose queue is shorter, does not pull the model to its own data.

    Parameters
    ----------
    round_s : float or None
        Seconds of training per order (None: ten times what an order costs besides).
    min_steps, max_steps : int
        Bounds of an order.
    outer_lr, momentum : float
        eta and beta of a Nesterov step scaled by participation rho (beta = 0: a plain step).
    size_steps : bool
        Size orders by speed and walltime; else every order has the configured steps.
    balance : bool
        The weights g_k; else 1/N.
    balance_arrivals : bool
        Their last factor.
    exponent : float
        a.
    overlap : bool
        The next order waits at the site while one is trained, so that transfers cost no time;
        it starts from the newest weights plus the expected share of the update in flight.
    """

    def __init__(
        self,
        *,
        round_s: float | None = None,
        min_steps: int = 10,
        max_steps: int = 4000,
        outer_lr: float = 1.0,
        momentum: float = 0.8,
        size_steps: bool = True,
        balance: bool = True,
        balance_arrivals: bool = True,
        exponent: float = 0.5,
        overlap: bool = False,
    ) -> None:
        super().__init__()
        self.overlap = overlap
        self.round_s = round_s
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.outer_lr = outer_lr
        self.momentum = momentum
        self.size_steps = size_steps
        self.balance = balance
        self.balance_arrivals = balance_arrivals
        self.exponent = exponent
        self.pace = Pace(0.7)
        self._steps: dict[str, float] = {}  # moving averages by facility
        self._frequency: dict[str, float] = {}
        self._m: tuple[str, ArrayRecord] | None = None
        self._own: dict[str, str] = {}  # facility -> its last pseudo-gradient in the store

    # ---- how much work ----------------------------------------------------------------------

    def plan(self, site: Site) -> Plan:
        """Return an order that fits the site's speed and what is left of its walltime."""
        steps = self._size(site)
        step_s = self.pace.step_s.get(site.facility)
        if not self.overlap:
            return Plan(steps)
        options = {"own-share": 0.0}  # the site remembers this update for the order after it
        if not step_s:
            return Plan(steps, options)
        # Handed in as late as possible, so that its weights are as new as possible.
        lead = 1.2 * self.pace.overhead_s[site.facility]
        after_s = max(0.0, (steps or self.default_steps) * step_s - lead)
        return Plan(steps, options, after_s)

    def plan_ahead(self, site: Site) -> Plan:
        """Return the next order, which starts where the site's own update will lead."""
        now = self.plan(site)
        share = self.outer_lr * self.share(site.facility)
        return Plan(now.steps, {"own-share": share}, now.ahead_after_s)

    def _size(self, site: Site) -> int:
        step_s = self.pace.step_s.get(site.facility)
        if not self.size_steps:
            return 0
        if not step_s:
            return self.min_steps
        steps = min(max(int(self._round_s(site.facility) / step_s), self.min_steps), self.max_steps)
        if site.warm and site.ends_at is not None:
            left = site.ends_at - self.now() - self.pace.overhead_s.get(site.facility, 0.0)
            if left < 1.3 * steps * step_s:
                steps = max(LEAST_STEPS, int(left / (1.06 * step_s)))
        return steps

    def _round_s(self, facility: str) -> float:
        return self.round_s or 10.0 * self.pace.overhead_s.get(facility, 60.0)

    # ---- how much it counts -----------------------------------------------------------------

    def staleness_weight(self, staleness: int) -> float:
        """Return (1 + tau / N)^-a."""
        return float((1.0 + staleness / self._sites()) ** -self.exponent)

    def share(self, facility: str) -> float:
        """Return g_k."""
        share = 1.0 / self._sites()
        if self.balance:
            share *= (_mean(self._steps) / self._steps[facility]) ** 0.5
        if self.balance_arrivals:
            fair = 1.0 / self._sites()
            share *= min(3.0, max(1.0 / 3.0, fair / self._frequency[facility]))
        return share

    def _sites(self) -> int:
        return max(1, len(self.sites))

    def on_arrival(self, arrival: Arrival, staleness: int) -> Tensors | None:
        """Step along the site's pseudo-gradient."""
        assert arrival.base is not None
        assert arrival.arrays is not None
        if arrival.empty or not self._knows_start(arrival):
            return None
        self._observe(arrival)
        facility, store = arrival.facility, self.runtime.checkpoints
        name = f"own-{arrival.order.id}"
        own = store.put(name, self._delta(arrival))
        self._own[facility] = name
        rho = self.share(facility) * self.staleness_weight(staleness)
        if not self.momentum:
            return rules.weighted_step(self.arrays, [own], [self.outer_lr * rho])
        name = f"momentum-{self.version + 1}"
        self._m = name, store.put(name, self._momenta(own, rho))
        pull = self.momentum * self.outer_lr * rho
        return rules.weighted_step(self.arrays, [own, self._m[1]], [self.outer_lr * rho, pull])

    def _momenta(self, delta: Record, rho: float) -> Tensors:
        for name, array in delta.items():
            before = None if self._m is None else self._m[1][name].numpy()
            scaled = array.numpy() * array.numpy().dtype.type(rho)
            yield name, rules.momentum_step(before, scaled, self.momentum**rho)

    def _knows_start(self, arrival: Arrival) -> bool:
        """Return whether it is known what the site started from: the update may be lost."""
        if not arrival.metrics.get("own_share"):
            return True
        last = self._own.get(arrival.facility, "")
        return last.endswith(f"-{int(arrival.metrics.get('own_seq', -1)):06d}")

    def _delta(self, arrival: Arrival) -> Tensors:
        """Yield the pseudo-gradient against the weights the site really started from."""
        assert arrival.base is not None
        assert arrival.arrays is not None
        share = arrival.metrics.get("own_share", 0.0)
        last = self._own.get(arrival.facility)
        before = self.runtime.checkpoints.get(last) if share and last else None
        for name, delta in rules.record_delta(arrival.base, arrival.arrays):
            if before is not None:
                delta = rules.descend(delta, before[name].numpy(), share)
            yield name, delta

    def _observe(self, arrival: Arrival) -> None:
        self.pace.observe(arrival, ahead=bool(arrival.order.options.get("own-share")))
        _blend(self._steps, arrival.facility, float(max(1, arrival.steps)), 0.3)
        recent = 1.0 / (8.0 * self._sites())
        self._frequency.setdefault(arrival.facility, 1.0 / self._sites())
        for name in self._frequency:
            _blend(self._frequency, name, float(name == arrival.facility), recent)

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the sites."""
        own = self._own if self.overlap else {}
        momentum = self._m[0] if self._m else ""
        return {
            "tensors": [*own.values(), *([momentum] if momentum else [])],
            "own": own,
            "momentum": momentum,
            "pace": self.pace.state_dict(),
            "steps": self._steps,
            "frequency": self._frequency,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self.pace.load_state_dict(state["pace"])
        self._own = dict(state["own"])
        name = str(state["momentum"])
        self._m = (name, self.runtime.checkpoints.get(name)) if name else None
        self._steps, self._frequency = dict(state["steps"]), dict(state["frequency"])


def _blend(table: dict[str, float], name: str, value: float, new: float) -> None:
    table[name] = (1.0 - new) * table[name] + new * value if name in table else value


def _mean(table: Mapping[str, float]) -> float:
    return sum(table.values()) / len(table)
