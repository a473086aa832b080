"""FedAsync: every arrival is mixed into the global model."""

from __future__ import annotations

from strategies.base.asynchronous import AsyncStrategy
from strategies.engine.state import Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.rules import STALENESS, Tensors


class FedAsync(AsyncStrategy):
    """FedAsync (arXiv 1903.03934): ``theta <- (1 - a) theta + a theta_k``, ``a = alpha s(tau)``.

    Sites train with a proximal term there: set ``proximal-mu`` by `proximal_mu`.

    Parameters
    ----------
    alpha : float
        Mixing weight of a fresh update.
    staleness : str
        s(tau): ``polynomial`` (1 + tau)^-a, ``hinge`` 1 up to b and then 1 / (a (tau - b) + 1),
        or ``constant``.
    a, b : float or None
        Its parameters; None: the paper's (polynomial a = 0.5; hinge a = 10, b = 4).
    proximal_mu : float
        Weight of the proximal term ``mu / 2 ||w - theta||^2`` at the sites.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.9,
        staleness: str = "polynomial",
        a: float | None = None,
        b: float | None = None,
        proximal_mu: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha={alpha} must lie in (0, 1]")
        for name, value in (("a", a), ("b", b), ("proximal_mu", proximal_mu)):
            limits.not_negative(name, value)
        if staleness not in STALENESS:
            raise ValueError(f"staleness='{staleness}' is not known. Valid: {', '.join(STALENESS)}")
        self.alpha = alpha
        self.staleness = staleness
        self.parameters = {k: v for k, v in {"a": a, "b": b}.items() if v is not None}
        self.proximal_mu = proximal_mu
        rules.staleness_weight(staleness, 0, **self.parameters)  # they go together, or say so now

    def staleness_weight(self, staleness: int) -> float:
        """Return s(tau)."""
        return rules.staleness_weight(self.staleness, staleness, **self.parameters)

    def counts(self, arrival: SiteResult, staleness: int) -> bool:
        """Return whether the site has trained at all."""
        return not arrival.empty

    def plan(self, site: SiteState) -> Plan:
        """Return an order with the proximal term, if any."""
        return Plan(options={"proximal-mu": self.proximal_mu} if self.proximal_mu else {})

    def on_result(self, arrival: SiteResult, staleness: int) -> Tensors | None:
        """Mix the site's weights in, unless they are only the old ones."""
        if not self.counts(arrival, staleness):
            return None
        assert arrival.arrays is not None
        alpha = self.alpha * self.staleness_weight(staleness)
        return rules.mixed(self.arrays, arrival.arrays, alpha)
