"""FedAvg with a deadline: quorum, over-selection, and a choice for what comes late."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from strategies.base.window import WindowStrategy
from strategies.engine.state import Plan, SiteState
from strategies.parts import limits, rules
from strategies.parts.blocks import Tensors
from strategies.parts.buffer import Update, deltas


class FedAvg(WindowStrategy):
    """FedAvg (arXiv 1602.05629) whose rounds wait no longer than they have to (1902.01046).

    A round asks `sites_per_round` x `over_selection` sites, drawn at random, and merges what has
    come when enough of them have reported or at its deadline; below `quorum` it goes on.

    Parameters
    ----------
    sites_per_round : int or None
        Reports wanted (None: of every site that is online).
    over_selection : float
        At least 1.
    outer_lr : float
        1 is FedAvg.
    proximal_mu : float
        FedProx (arXiv 1812.06127): sites add ``mu / 2 ||w - theta||^2`` to their loss.
    **window
        ``deadline_s``, ``quorum``, ``grace_s``, ``late``, ``weighted_by``, ``exponent``,
        ``average`` and ``size_steps``, see `strategies.base.window.WindowStrategy`.
    """

    def __init__(
        self,
        *,
        sites_per_round: int | None = None,
        over_selection: float = 1.0,
        outer_lr: float = 1.0,
        proximal_mu: float = 0.0,
        **window: Any,
    ) -> None:
        super().__init__(**window)
        limits.positive("sites_per_round", sites_per_round)
        limits.positive("outer_lr", outer_lr)
        limits.not_negative("proximal_mu", proximal_mu)
        if not 1 <= over_selection < math.inf:
            raise ValueError(f"over_selection={over_selection} must be at least 1")
        self.sites_per_round = sites_per_round
        self.over_selection = over_selection
        self.outer_lr = outer_lr
        self.proximal_mu = proximal_mu

    def selected(self) -> int | None:
        """Return how many sites are to take part."""
        wanted = self.sites_per_round
        return None if wanted is None else math.ceil(wanted * self.over_selection)

    def complete(self) -> bool:
        """Return whether the reports that were wanted are there."""
        wanted = self.sites_per_round
        return super().complete() or (wanted is not None and len(self.reported()) >= wanted)

    def order(self, site: SiteState) -> Plan:
        """Return an order with the proximal term, if any."""
        return Plan(
            self.order_steps(site),
            {"proximal-mu": self.proximal_mu} if self.proximal_mu else {},
        )

    def merge(self, updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
        """Step along the weighted mean pseudo-gradient."""
        found = deltas(updates)
        self.averaged(found, weights)
        return rules.weighted_step(self.arrays, found, weights, self.outer_lr)
