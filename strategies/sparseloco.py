"""SparseLoCo: rounds of sparse updates, each value averaged over the sites that sent it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from strategies.base.hpc_strategy import HpcStrategy
from strategies.parts import limits, rules
from strategies.parts.blocks import Tensor, Tensors, blockwise
from strategies.parts.rules import Record


class SparseLoCo(HpcStrategy):
    """SparseLoCo (arXiv 2508.15706): inner AdamW, top-k with error feedback, a plain outer step.

    The error feedback at the sites (`exchange.feedback`) stands for DiLoCo's outer momentum. Each
    value is averaged over the sites that sent it, as in the authors' code, so that the step does
    not shrink with the number of sites, of which few send the same values::

        theta <- theta - eta sum_k w_k delta_k / sum_k w_k [delta_k != 0]

    Of updates that are not sparse (another `exchange.codec` than top-k) it is FedAvg with a step.

    Parameters
    ----------
    outer_lr : float
        eta.
    weighted_by : str
        ``uniform`` (the paper's) or ``num-examples``.
    """

    def __init__(
        self,
        *,
        outer_lr: float = 1.0,
        weighted_by: Literal["num-examples", "uniform"] = "uniform",
    ) -> None:
        super().__init__(weighted_by=weighted_by)
        limits.positive("outer_lr", outer_lr)
        self.outer_lr = outer_lr

    def aggregate(
        self, server_round: int, trained: Sequence[Record], weights: Sequence[float]
    ) -> Tensors:
        """Return the weights after the outer step."""

        def rule(theta: Tensor, *found: Tensor) -> Tensor:
            deltas = [rules.pseudo_gradient(theta, x) for x in found]
            return rules.descend(theta, rules.sender_mean(deltas, weights), self.outer_lr)

        for name, array in self.arrays.items():
            yield name, blockwise(rule, array, *(record[name] for record in trained))
