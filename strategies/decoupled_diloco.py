"""Decoupled DiLoCo: a quorum and a grace, norms and directions averaged apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from strategies.base.window import WindowStrategy
from strategies.parts import rules
from strategies.parts.blocks import Lazy, Tensors
from strategies.parts.buffer import Update, deltas
from strategies.parts.outer import OuterSGD


class DecoupledDiLoCo(WindowStrategy):
    """Decoupled DiLoCo (arXiv 2604.21428): no site is waited for beyond a quorum and a grace.

    Updates are weighted by tokens^2 / steps and merged tensor by tensor as
    ``(sum w ||delta|| / sum w) phi(sum w phi(delta))``, phi the unit vector; the merged
    pseudo-gradient takes DiLoCo's outer step.

    Parameters
    ----------
    quorum : int
    grace_s : float
        Further updates are waited for so long once the quorum is there.
    outer_lr, momentum, nesterov :
        Of the outer step, see `strategies.diloco.DiLoCo`.
    late, exponent :
        See `strategies.base.window.WindowStrategy`.
    **base
        ``average`` and ``size_steps`` with its bounds, see
        `strategies.base.asynchronous.AsyncStrategy`.
    """

    def __init__(
        self,
        *,
        quorum: int = 1,
        grace_s: float = 60.0,
        outer_lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        late: Literal["merge", "drop"] = "merge",
        exponent: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(
            quorum=quorum,
            grace_s=grace_s,
            late=late,
            weighted_by="uniform",  # its own weights are tokens^2 / steps
            exponent=exponent,
            **base,
        )
        self.outer = OuterSGD(outer_lr, momentum, nesterov)

    def weight(self, update: Update) -> float:
        """Return tokens^2 / steps."""
        return float(update.tokens) ** 2 / max(1, update.steps)

    def merge(self, updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
        """Take the outer step along the radial-directional mean."""
        found = deltas(updates)

        def merged(name: str) -> Lazy:
            return rules.radial_directional(name, found, weights)

        return self.outer.step(self.keep_tensors, self.arrays, merged)
