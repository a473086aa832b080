"""Bounds on how far one result may move the weights, by the norm of its update.

A site whose updates have had norms around m for a while is refused one of 1000 m: its data broke,
its learning rate was mistyped, or it means harm. Sites differ, so each is held to itself: the first
few updates of a site are not bounded. Clipping refuses none: an update whose norm is above a bound
that is the same for all sites is scaled down to it, and keeps its direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
from flwr.app import ArrayRecord

from strategies.parts import rules
from strategies.parts.blocks import Lazy, Tensor, blockwise, flat_blocks, made_record
from strategies.parts.rules import Record, record_delta

WINDOW = 20  # updates of a site that count
ENOUGH = 5  # as many as make a median


@dataclass(frozen=True)
class Judged:
    """What comes of measuring an update."""

    fault: str = ""  # Why it is refused
    scale: float = 1.0  # At most 1


class UpdateNorms:
    """Holds updates to the norms of their site, and clips them to one bound.

    Parameters
    ----------
    limit : float or None
        Times the median of the site's last norms, above which an update is refused.
    clip : float or None
        Norm to which larger updates are scaled.
    quantile : float or None
        In place of `clip`: this quantile of the last norms of all sites, once there are enough.
    norms : dict of str to list of float
        By facility, oldest first; kept up to date, to be saved with the engine's state.
    """

    def __init__(
        self,
        limit: float | None,
        clip: float | None,
        quantile: float | None,
        norms: dict[str, list[float]],
    ) -> None:
        self.limit, self.clip, self.quantile = limit, clip, quantile
        self.norms = norms

    def judge(self, facility: str, base: Record, trained: Record) -> Judged:
        """Measure an update, if anything is bounded; its norm is noted unless it is refused."""
        if self.limit is None and self.clip is None and self.quantile is None:
            return Judged()
        norm, before = update_norm(base, trained), self.norms.get(facility, [])
        if not math.isfinite(norm):
            return Judged("the norm of its update is not finite")
        usual = median(before) if self.limit is not None and len(before) >= ENOUGH else 0.0
        if self.limit is not None and usual and norm > self.limit * usual:
            return Judged(
                f"the norm of its update, {norm:.3g}, is above {self.limit:g} times the median "
                f"{usual:.3g} of this site's last {len(before)}"
            )
        bound = self.bound()
        self.norms[facility] = [*before, norm][-WINDOW:]
        return Judged(scale=clip_scale(norm, bound))

    def bound(self) -> float:
        """Return the norm that the next update is clipped to."""
        if self.clip is not None:
            return self.clip
        known = [norm for norms in self.norms.values() for norm in norms]
        if self.quantile is None or len(known) < ENOUGH:
            return math.inf
        return float(np.quantile(known, self.quantile))


def clip_scale(norm: float, bound: float) -> float:
    """Return what an update of that norm is multiplied by, so that it is no longer than a bound."""
    return min(1.0, bound / norm) if norm > 0.0 else 1.0


def update_norm(base: Record, trained: Record) -> float:
    """Return the norm of the difference, over the tensors that were returned; in one pass."""
    deltas = record_delta({name: base[name] for name in trained}, trained)
    squares = (_square(block) for _, delta in deltas for block in flat_blocks(delta))
    return math.sqrt(math.fsum(squares))


def scaled_update(base: ArrayRecord, trained: ArrayRecord, scale: float) -> ArrayRecord:
    """Return ``base + scale (trained - base)``, made a tensor at a time when it is read."""
    return trained if scale == 1.0 else made_record(trained, partial(_scaled, base, trained, scale))


def _scaled(base: ArrayRecord, trained: ArrayRecord, scale: float, name: str) -> Lazy:
    def rule(start: Tensor, end: Tensor) -> Tensor:
        moved = rules.descend(start, rules.pseudo_gradient(start, end), scale)
        return np.asarray(moved, dtype=end.dtype)

    return blockwise(rule, base[name], trained[name])


def _square(values: Tensor) -> float:
    """Return the sum of squares, in float64: in float32 large ones would be infinite."""
    wide = values.astype(np.float64)
    return float(wide @ wide)
