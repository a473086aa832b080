"""DiLoCo: few, large synchronous steps of an outer optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from strategies.base.hpc_strategy import HpcStrategy
from strategies.parts import rules
from strategies.parts.blocks import Lazy, Tensors
from strategies.parts.outer import OuterSGD
from strategies.parts.rules import Record

MEANS = {"sites": rules.weighted_mean, "senders": rules.sender_mean}


class DiLoCo(HpcStrategy):
    """DiLoCo (arXiv 2311.08105): inner AdamW at the sites, outer Nesterov momentum here.

    With ``delta = sum_k w_k (theta - theta_k)``::

        m     <- beta m + delta
        theta <- theta - eta (delta + beta m)

    eta = 1 and beta = 0 is FedAvg; plain momentum with eta = 1 is FedAvgM (arXiv 1909.06335).

    With eta = 1, beta = 0, ``averaged_over="senders"`` and sparse updates (`exchange.codec`) it is
    SparseLoCo (arXiv 2508.15706): error feedback at the sites stands for the momentum, and each
    value is averaged over the sites that sent it, as in the code of the authors' first release
    (CCLoco), so that the step does not shrink with the number of sites, of which few send the same
    values::

        delta = sum_k w_k (theta - theta_k) / sum_k w_k [theta != theta_k]

    Parameters
    ----------
    outer_lr : float
        eta.
    momentum : float
        beta.
    nesterov : bool
        Else momentum is plain: ``theta <- theta - eta m``.
    weighted_by : str
        ``uniform`` (the paper's) or ``num-examples``.
    averaged_over : str
        All ``sites``, or of each value its ``senders``.

    Raises
    ------
    ValueError
        If `averaged_over` is neither.
    """

    def __init__(
        self,
        *,
        outer_lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        weighted_by: Literal["num-examples", "uniform"] = "uniform",
        averaged_over: Literal["sites", "senders"] = "sites",
    ) -> None:
        super().__init__(weighted_by=weighted_by)
        if averaged_over not in MEANS:
            raise ValueError(
                f"averaged_over={averaged_over} is not known. Valid: {', '.join(MEANS)}"
            )
        self.mean = MEANS[averaged_over]
        self.outer = OuterSGD(outer_lr, momentum, nesterov)

    def aggregate(
        self, server_round: int, trained: Sequence[Record], weights: Sequence[float]
    ) -> Tensors:
        """Return the weights after the outer step."""

        def delta_of(name: str) -> Lazy:
            return rules.combined_delta(name, self.arrays, trained, weights, self.mean)

        return self.outer.step(self.keep_tensors, self.arrays, delta_of)
