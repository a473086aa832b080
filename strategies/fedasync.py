"""FedAsync: every result is mixed into the global model."""

from __future__ import annotations

from typing import Any, Literal

from strategies.base.asynchronous import AsyncStrategy
from strategies.engine.state import Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.balance import ExampleShares
from strategies.parts.blocks import Tensors
from strategies.parts.lora import adapters


class FedAsync(AsyncStrategy):
    """FedAsync (arXiv 1903.03934): ``theta <- (1 - c) theta + c theta_k``, ``c = alpha s(tau) p``.

    Sites train with a proximal term there: set ``proximal-mu`` by `proximal_mu`.

    Parameters
    ----------
    alpha : float
        Mixing weight of a fresh update.
    staleness : str
        s(tau), see `strategies.parts.rules.staleness_weight`.
    a, b : float or None
        Its parameters; None: the paper's (polynomial a = 0.5; hinge a = 10, b = 4).
    proximal_mu : float
        Weight of the proximal term ``mu / 2 ||w - theta||^2`` at the sites.
    share : str
        p: ``one`` (the paper's), ``uniform`` 1/N, or ``num-examples``, the site's share of all
        examples. The last two are APPFL's.
    moves : str
        ``model`` mixes the site's weights in (the paper's); ``difference`` steps by what they
        moved, ``theta <- theta - c (theta_base - theta_k)``, as APPFL does with
        ``send_gradient``. They differ for stale updates, which the first pulls back.
    **base
        ``average`` and ``size_steps`` with its bounds, see
        `strategies.base.asynchronous.AsyncStrategy`.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.9,
        staleness: str = "polynomial",
        a: float | None = None,
        b: float | None = None,
        proximal_mu: float = 0.0,
        share: Literal["one", "uniform", "num-examples"] = "one",
        moves: Literal["model", "difference"] = "model",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        limits.positive_share("alpha", alpha)
        limits.not_negative("proximal_mu", proximal_mu)
        limits.one_of("share", share, ("one", "uniform", "num-examples"))
        limits.one_of("moves", moves, ("model", "difference"))
        self.alpha = alpha
        self.proximal_mu = proximal_mu
        self.share = share
        self.moves = moves
        self._decay = rules.staleness_rule(staleness, a=a, b=b)
        self._examples = ExampleShares()

    def staleness_weight(self, staleness: int) -> float:
        """Return s(tau)."""
        return self._decay(staleness)

    def plan(self, site: SiteState) -> Plan:
        """Return an order with the proximal term, if any."""
        return Plan(
            self.order_steps(site),
            {"proximal-mu": self.proximal_mu} if self.proximal_mu else {},
        )

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Mix the site's weights in."""
        assert result.base is not None
        assert result.arrays is not None
        c = self.alpha * self.staleness_weight(staleness) * self._share(result)
        if self.moves == "model":
            self.combined = adapters.mixture_of(self.arrays, [result.arrays], [c])
            return rules.mixed(self.arrays, result.arrays, c)
        delta = adapters.difference(result.base, result.arrays)
        self.combined = adapters.step_of(self.arrays, [delta], [c])
        return rules.stepped(self.arrays, result.base, result.arrays, c)

    def _share(self, result: SiteResult) -> float:
        """Return p."""
        self._examples.observe(result.facility, result.examples)
        if self.share == "num-examples":
            return self._examples.of(result.facility, self.num_sites)
        return 1.0 if self.share == "one" else 1.0 / self.num_sites
