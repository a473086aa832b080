"""The average of a strategy's versions, which may be published in place of the newest."""

from __future__ import annotations

from strategies.base.fields import Keep, StoredTensors
from strategies.parts import limits, rules
from strategies.parts.blocks import Tensor, blockwise
from strategies.parts.rules import Record


class PublishedAverage:
    """Polynomial-decay averaging (arXiv 1212.1824) over versions that are parts of a round.

    A version that stands for the part rho of a round (the updates in it / N) goes into it by::

        mean <- (1 - c) mean + c theta,   c = min(1, (1 + gamma) rho / (t + gamma))

    with t the sum of all rho so far. The mean is what steps decay to that grow smaller, without
    a schedule that knows how long the run will be: the larger gamma, the more recent the weights
    in it.

    Parameters
    ----------
    gamma : float or None
        Not negative, a strategy's `average`; None: no mean is kept.

    Attributes
    ----------
    mean : StoredTensors or None
        None while there is no version but the initial one.
    """

    persistent = ("mean", "_rounds")

    def __init__(self, gamma: float | None) -> None:
        limits.not_negative("average", gamma)
        self.gamma = gamma
        self.mean: StoredTensors | None = None
        self._rounds = 0.0  # t

    def models_kept(self, sites: int) -> int:
        """Return 2 if there is a mean: the former one is deleted when the new one is kept."""
        return 2 * (self.gamma is not None)

    def add(self, keep: Keep, former: Record, new: Record, rho: float) -> None:
        """Take a version in.

        Parameters
        ----------
        keep : callable
            The strategy's `keep_tensors`.
        former, new : Record
            The version before, with which the mean begins, and this one.
        rho : float
        """
        if self.gamma is None:
            return
        self._rounds += rho
        c = min(1.0, (1.0 + self.gamma) * rho / (self._rounds + self.gamma))
        mean: Record = former if self.mean is None else self.mean

        def rule(x: Tensor, y: Tensor) -> Tensor:
            return rules.interpolated(x, y, c)

        self.mean = keep("mean", ((n, blockwise(rule, mean[n], new[n])) for n in new))
