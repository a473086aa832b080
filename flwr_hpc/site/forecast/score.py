"""How good earlier forecasts of the queue were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flwr_hpc.site.forecast.history import Wait


class Score(NamedTuple):
    """Earlier forecasts, compared with the real waits."""

    checked: int  # How many could be compared
    error_s: float | None  # Median absolute error of the medians
    coverage: float | None  # Share of waits that were no longer than the upper quantile


def score_forecasts(waits: Sequence[Wait], quantile: float) -> Score:
    """Compare earlier forecasts with the real waits; the upper ones where they are `quantile`.

    A wait that was not over, but longer than forecast, counts for the coverage alone.
    """
    errors, covered = [], []
    for wait in waits:
        if wait.void or wait.waited_s is None or wait.median_s is None or wait.high_s is None:
            continue
        if wait.over:
            errors.append(abs(wait.waited_s - wait.median_s))
        if wait.quantile == quantile and (wait.over or wait.waited_s > wait.high_s):
            covered.append(wait.waited_s <= wait.high_s)
    error = float(np.median(errors)) if errors else None
    return Score(len(covered), error, float(np.mean(covered)) if covered else None)
