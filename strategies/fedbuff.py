"""FedBuff: buffered asynchronous aggregation."""

from __future__ import annotations

from typing import Any, Literal

from strategies.base.asynchronous import AsyncStrategy
from strategies.base.fields import StoredTensors
from strategies.engine.state import SiteResult
from strategies.parts import limits, rules
from strategies.parts.balance import ContributionBalance, ExampleShares
from strategies.parts.blocks import Tensors
from strategies.parts.lora import adapters


class FedBuff(AsyncStrategy):
    """FedBuff (arXiv 2106.06639): every K results one step along their mean pseudo-gradient.

    ``theta <- theta - eta / K  sum_k s(tau_k) delta_k`` with ``delta_k = theta_base - theta_k``
    against the version site k started from and tau_k the versions made since then. Results
    of one site fill the buffer like those of many.

    Parameters
    ----------
    buffer_size : int
        K.
    outer_lr : float
        eta.
    staleness : str
        s(tau), see `strategies.parts.rules.staleness_weight`.
    a, b : float or None
        Its parameters; None: the paper's ``1 / sqrt(1 + tau)``, and those of the others.
    debias : bool
        Divide a site's weight by how often it arrives (`strategies.parts.balance`): fast sites
        fill the buffer with their data's updates. Not in the paper.
    divide_by : str
        In place of 1/K (``buffer``, the paper's): ``sites`` 1/N, or ``num-examples``, the site's
        share of all examples. The last two are APPFL's, with ``outer_lr`` its alpha, 0.9.
    moves : str
        ``difference`` (the paper's), or ``model``: ``theta - theta_k``, against the weights at the
        step and not those the site started from, is APPFL's without ``send_gradient``.
    **base
        ``average`` and ``size_steps`` with its bounds, see
        `strategies.base.asynchronous.AsyncStrategy`.
    """

    persistent = ("_buffer",)

    def __init__(
        self,
        *,
        buffer_size: int = 10,
        outer_lr: float = 1.0,
        staleness: str = "polynomial",
        a: float | None = None,
        b: float | None = None,
        debias: bool = False,
        divide_by: Literal["buffer", "sites", "num-examples"] = "buffer",
        moves: Literal["model", "difference"] = "difference",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if buffer_size < 1:
            raise ValueError(f"buffer_size={buffer_size} must be at least 1")
        limits.positive("outer_lr", outer_lr)
        limits.one_of("divide_by", divide_by, ("buffer", "sites", "num-examples"))
        limits.one_of("moves", moves, ("model", "difference"))
        self.buffer_size = buffer_size
        self.outer_lr = outer_lr
        self.debias = debias
        self.divide_by = divide_by
        self.moves = moves
        self.rates = ContributionBalance()
        self._decay = rules.staleness_rule(staleness, a=a, b=b)
        self._examples = ExampleShares()
        # Facility, weight, and what moves: a pseudo-gradient or a model.
        self._buffer: list[tuple[str, float, StoredTensors]] = []

    def staleness_weight(self, staleness: int) -> float:
        """Return s(tau)."""
        return self._decay(staleness)

    def models_kept(self, sites: int) -> int:
        """Return those of its parts and K updates."""
        return super().models_kept(sites) + self.buffer_size

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Buffer the update; the K-th makes a new version."""
        weight = self.staleness_weight(staleness) * self._frequency_weight(result)
        self._examples.observe(result.facility, result.examples)
        self._buffer.append((result.facility, weight, self._update(result)))
        if len(self._buffer) < self.buffer_size:
            return None
        full, self._buffer = self._buffer, []
        weights = [weight * self._share(facility) for facility, weight, _ in full]
        updates = [update for _, _, update in full]
        if self.moves == "difference":
            self.averaged(updates, weights)
            return rules.weighted_step(self.arrays, updates, weights, self.outer_lr)
        self.combined = adapters.mixture_of(self.arrays, updates, weights)
        return rules.weighted_pull(self.arrays, updates, weights, self.outer_lr)

    def _update(self, result: SiteResult) -> StoredTensors:
        assert result.base is not None
        assert result.arrays is not None
        if self.moves == "model":
            return self.keep_tensors("model", rules.tensors(result.arrays))
        return self.keep_tensors("delta", rules.record_delta(result.base, result.arrays))

    def _share(self, facility: str) -> float:
        sites = self.num_sites
        if self.divide_by == "num-examples":
            return self._examples.of(facility, sites)
        return 1.0 / (self.buffer_size if self.divide_by == "buffer" else sites)

    def _frequency_weight(self, result: SiteResult) -> float:
        sites = self.num_sites
        self.rates.observe(result.facility, result.steps, sites)
        return self.rates.by_arrivals(result.facility, sites) if self.debias else 1.0
