"""Rounds whose version a few wrong sites cannot move far: median, trimmed mean, Krum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from strategies.fedavg import FedAvg
from strategies.parts import limits, robust, rules
from strategies.parts.blocks import Tensor, Tensors, blockwise
from strategies.parts.buffer import Update, deltas
from strategies.parts.rules import Record

RULES = ("median", "trimmed_mean", "krum")


class RobustFedAvg(FedAvg):
    """FedAvg with another centre of the sites' updates than their mean.

    For sites whose data or hardware may be broken, or that may mean harm. Neither examples nor
    staleness weigh an update: a wrong site would claim many. Updates are read a tensor at a time.

    Parameters
    ----------
    rule : str
        ``median`` or ``trimmed_mean`` of every number (arXiv 1803.01498), or ``krum``: the updates
        that lie closest to their neighbours (arXiv 1703.02757).
    cut : float
        Share of the sites that the trimmed mean leaves out at either end; below 0.5.
    malicious : int
        f: sites that may be wrong, for Krum, which holds for 2 f + 2 < n of n that report.
    selected : int
        Updates that Krum takes the mean of; more than 1 is Multi-Krum.
    **fedavg
        Those of `strategies.fedavg.FedAvg`.
    """

    def __init__(
        self,
        *,
        rule: Literal["median", "trimmed_mean", "krum"] = "median",
        cut: float = 0.2,
        malicious: int = 1,
        selected: int = 1,
        **fedavg: Any,
    ) -> None:
        super().__init__(**{"weighted_by": "uniform", **fedavg})
        limits.one_of("rule", rule, RULES)
        limits.positive("selected", selected)
        limits.not_negative("malicious", malicious)
        robust.check_cut(cut)
        limits.one_of("weighted_by", self.weighted_by, ("uniform",))
        self.rule, self.cut = rule, cut
        self.malicious, self.selected_updates = malicious, selected
        self._taken: set[str] | None = None  # Of the newest version; None: all

    def merge(self, updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
        """Step along the centre of the pseudo-gradients."""
        if self.rule == "krum":
            found = deltas(updates)
            taken = robust.krum(found, self.malicious, self.selected_updates)
            self._taken = {updates[k].facility for k in taken}
            return super().merge([updates[k] for k in taken], [1.0 / len(taken)] * len(taken))
        return self._centred(deltas(updates))

    def _centred(self, found: Sequence[Record]) -> Tensors:
        def rule(here: Tensor, *updates: Tensor) -> Tensor:
            centre = (
                robust.median(updates)
                if self.rule == "median"
                else robust.trimmed_mean(updates, self.cut)
            )
            return rules.descend(here, centre, self.outer_lr)

        for name, array in self.arrays.items():
            yield name, blockwise(rule, array, *(delta[name] for delta in found))

    def reported_weight(self, facility: str, staleness: int, updates: int) -> float:
        """Return what a site counts that was taken; of a median, all alike."""
        if self._taken is None:
            return 1.0 / updates
        return float(facility in self._taken) / len(self._taken)
