"""A bound on how far one result may move the weights, by what its site did before.

A site whose updates have had norms around m for a while is refused one of 1000 m: its data broke,
its learning rate was mistyped, or it means harm. Sites differ, so each is held to itself: the first
few updates of a site are not bounded.
"""

from __future__ import annotations

import math
from statistics import median

import numpy as np

from strategies.parts.rules import Record, Tensor, record_delta

WINDOW = 20  # updates of a site that count
ENOUGH = 5  # as many as make a median
CHUNK = 1 << 20  # numbers squared at a time


class NormLimit:
    """Holds updates to the norms of their site.

    Parameters
    ----------
    limit : float or None
        Times the median (None: nothing is measured).
    norms : dict of str to list of float
        By facility, oldest first; kept up to date, to be saved with the engine's state.
    """

    def __init__(self, limit: float | None, norms: dict[str, list[float]]) -> None:
        self.limit = limit
        self.norms = norms

    def fault(self, facility: str, base: Record, trained: Record) -> str | None:
        """Return why an update is too large, or note its norm."""
        if self.limit is None:
            return None
        norm, before = update_norm(base, trained), self.norms.get(facility, [])
        if not math.isfinite(norm):
            return "the norm of its update is not finite"
        usual = median(before) if len(before) >= ENOUGH else 0.0
        if usual and norm > self.limit * usual:
            return (
                f"the norm of its update, {norm:.3g}, is above {self.limit:g} times the median "
                f"{usual:.3g} of this site's last {len(before)}"
            )
        self.norms[facility] = [*before, norm][-WINDOW:]
        return None


def update_norm(base: Record, trained: Record) -> float:
    """Return the norm of the difference, over the tensors that were returned; in one pass."""
    deltas = record_delta({name: base[name] for name in trained}, trained)
    return math.sqrt(math.fsum(_square(delta.reshape(-1)) for _, delta in deltas))


def _square(values: Tensor) -> float:
    """Return the sum of squares, in float64: in float32 large ones would be infinite."""
    total = 0.0
    for start in range(0, values.size, CHUNK):
        part = values[start : start + CHUNK].astype(np.float64)
        total += float(part @ part)
    return total
