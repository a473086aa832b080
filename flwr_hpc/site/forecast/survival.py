"""Quantiles of waiting times of which some are not over yet. Pure functions.

The estimator is Kaplan and Meier's (1958), with weights: a wait that is not over counts among
those that could still end for as long as it has lasted, and then leaves. Two things are added.
One more wait, as heavy as the heaviest, is taken to outlast all that were seen: of n equal
waits the share 1/(n + 1) is expected beyond the longest, so that a quantile above what n waits
can tell is not read off the longest of them. And beyond the longest wait what is left falls as
1/t: who has waited longer than anybody before waits as long again in the median.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Survival(NamedTuple):
    """Share of waits that last longer than ``times``, which ascend; starts with 1 at 0."""

    times: Floats
    left: Floats

    def at(self, time: float) -> float:
        """Return the share of waits that are longer."""
        if time > self.times[-1]:
            return float(self.left[-1] * self.times[-1] / time)
        return float(self.left[np.searchsorted(self.times, time, side="right") - 1])

    def quantile(self, q: float, age: float = 0.0) -> float:
        """Return the `q` quantile of the whole wait of somebody who has waited for `age`."""
        target = (1.0 - q) * self.at(age)
        reached = np.flatnonzero(self.left <= target * (1 + 1e-9))
        if reached.size:
            return max(age, float(self.times[reached[0]]))
        return max(age, float(self.times[-1] * self.left[-1] / target))


def survival(times: Floats, over: NDArray[np.bool_], weights: Floats) -> Survival | None:
    """Estimate how long waits last.

    Parameters
    ----------
    times : array
        Above 0; how long each wait lasted, or has lasted so far.
    over : array of bool
        Whether it has ended.
    weights : array
        How much each tells; only their ratios matter.

    Returns
    -------
    Survival or None
        None if there is nothing to go by.
    """
    keep = weights > 0
    if not keep.any():
        return None
    times, over, weights = times[keep], over[keep], weights[keep] / weights[keep].max()
    order = np.lexsort((~over, times))  # of equal times those that are over come first
    times, over, weights = times[order], over[order], weights[order]
    at_risk = np.cumsum(weights[::-1])[::-1] + 1.0  # the one that outlasts them all
    left = np.cumprod(1.0 - over * weights / at_risk)
    return Survival(np.concatenate(([0.0], times)), np.concatenate(([1.0], left)))
