"""FedBuff: buffered asynchronous aggregation."""

from __future__ import annotations

from strategies.base.asynchronous import AsyncStrategy
from strategies.base.fields import StoredTensors
from strategies.engine.state import SiteResult
from strategies.parts import limits, rules
from strategies.parts.balance import ContributionBalance
from strategies.parts.rules import STALENESS, Tensors


class FedBuff(AsyncStrategy):
    """FedBuff (arXiv 2106.06639): every K arrivals one step along their mean pseudo-gradient.

    ``theta <- theta - eta / K  sum_k s(tau_k) delta_k`` with ``delta_k = theta_base - theta_k``
    against the version site k started from and tau_k the versions made since then. Arrivals
    of one site fill the buffer like those of many.

    Parameters
    ----------
    buffer_size : int
        K.
    outer_lr : float
        eta.
    staleness : str
        s(tau): ``polynomial`` (1 + tau)^-a, ``constant`` or ``hinge``; see
        `strategies.parts.rules.staleness_weight`.
    exponent : float
        a of the polynomial; 0.5 is the paper's 1 / sqrt(1 + tau).
    debias : bool
        Divide a site's weight by how often it arrives (`strategies.parts.balance`): fast sites
        fill the buffer with their data's updates. Not in the paper.
    """

    persistent = ("_buffer",)

    def __init__(
        self,
        *,
        buffer_size: int = 10,
        outer_lr: float = 1.0,
        staleness: str = "polynomial",
        exponent: float = 0.5,
        debias: bool = False,
    ) -> None:
        super().__init__()
        if buffer_size < 1:
            raise ValueError(f"buffer_size={buffer_size} must be at least 1")
        limits.positive("outer_lr", outer_lr)
        limits.not_negative("exponent", exponent)
        if staleness not in STALENESS:
            raise ValueError(f"staleness='{staleness}' is not known. Valid: {', '.join(STALENESS)}")
        self.buffer_size = buffer_size
        self.outer_lr = outer_lr
        self.staleness = staleness
        self.exponent = exponent
        self.debias = debias
        self.rates = ContributionBalance()
        self._buffer: list[tuple[StoredTensors, float]] = []  # pseudo-gradients, their weights

    def staleness_weight(self, staleness: int) -> float:
        """Return s(tau)."""
        parameters = {"a": self.exponent} if self.staleness == "polynomial" else {}
        return rules.staleness_weight(self.staleness, staleness, **parameters)

    def counts(self, arrival: SiteResult, staleness: int) -> bool:
        """Return whether something was trained."""
        return not arrival.empty

    def on_result(self, arrival: SiteResult, staleness: int) -> Tensors | None:
        """Buffer the pseudo-gradient; the K-th makes a new version."""
        if arrival.empty:
            return None
        assert arrival.base is not None
        assert arrival.arrays is not None
        delta = self.keep_tensors("delta", rules.record_delta(arrival.base, arrival.arrays))
        weight = self.staleness_weight(staleness) * self._frequency_weight(arrival)
        self._buffer.append((delta, weight))
        if len(self._buffer) < self.buffer_size:
            return None
        full, self._buffer = self._buffer, []
        deltas, weights = zip(*full, strict=True)
        return rules.buffered_step(self.arrays, deltas, weights, self.outer_lr)

    def _frequency_weight(self, arrival: SiteResult) -> float:
        sites = max(1, len(self.sites))
        self.rates.observe(arrival.facility, arrival.steps, sites)
        return self.rates.by_arrivals(arrival.facility, sites) if self.debias else 1.0
