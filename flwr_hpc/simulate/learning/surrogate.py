"""Learning as a formula, for sweeps over hundreds of runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from flwr_hpc.simulate.learning.base import Weights

FLOOR, START = 1.0, 2.5  # held-out loss at the optimum and at the start


class SurrogateLearner:
    """Every site is pulled to an optimum of its own, near the common one.

    A step moves the weights by a share `rate` of the way to the site's optimum, with noise; the
    held-out loss grows with the squared distance to the mean of the optima.

    Parameters
    ----------
    sites : int
    seed : int
    skew : float
        Distance of the sites' optima from their mean, the start being at distance 1.
    rate, noise : float
        Of a step.
    """

    target = 1.45

    def __init__(
        self, sites: int, seed: int, skew: float = 0.7, rate: float = 2e-3, noise: float = 0.02
    ) -> None:
        rng = np.random.default_rng([seed, 7])
        self.rate, self.noise = rate, noise
        away = rng.normal(size=(sites, 8))
        away -= away.mean(axis=0)
        norms = np.linalg.norm(away, axis=1, keepdims=True)
        self._optima = skew * away / np.maximum(norms, 1e-9)
        start = rng.normal(size=8)
        self._start = start / np.linalg.norm(start)
        self._rngs = [np.random.default_rng([seed, 8, k]) for k in range(sites)]

    def initial(self) -> Weights:
        """Return the start, at distance 1 from the optimum."""
        return {"point": self._start.astype(np.float32)}

    def train(
        self,
        site: int,
        weights: Weights,
        steps: int,
        lr_scale: float = 1.0,
        mu: float = 0.0,
        anchor: Weights | None = None,
        correction: Weights | None = None,
        gradients: Weights | None = None,
    ) -> tuple[Weights, float]:
        """Return the weights after `steps` steps, in one formula, and the loss there.

        The gradient is the distance to the site's optimum; see `Learner.train` of `learning.base`.
        """
        point, own = weights["point"].astype(float), self._optima[site]
        goal = own - correction["point"] if correction else own  # both move the optimum
        if mu and anchor is not None:
            goal = (goal + mu * anchor["point"].astype(float)) / (1.0 + mu)
        rate = min(1.0, self.rate * lr_scale * (1.0 + mu))
        keep = (1.0 - rate) ** steps
        spread = self.noise * rate * np.sqrt((1.0 - keep * keep) / (1.0 - (1.0 - rate) ** 2))
        if gradients is not None:  # the sum over the path, without the noise
            path = steps * (goal - own) + (point - goal) * (1.0 - keep) / rate
            gradients["point"] = gradients.get("point", 0.0) + path.astype(np.float32)
        point = goal + keep * (point - goal) + spread * self._rngs[site].normal(size=8)
        return {"point": point.astype(np.float32)}, float(np.square(point - goal).sum())

    def evaluate(self, weights: dict[str, Any]) -> float:
        """Return the held-out loss."""
        point = np.asarray(weights["point"], dtype=float)
        return float(FLOOR + (START - FLOOR) * np.square(point).sum())
