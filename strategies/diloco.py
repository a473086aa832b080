"""DiLoCo: few, large synchronous steps of an outer optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flwr.app import ArrayRecord

from strategies import rules
from strategies.base import HpcStrategy
from strategies.rules import Record, Tensors

__all__ = ["DiLoCo"]


class DiLoCo(HpcStrategy):
    """DiLoCo (arXiv 2311.08105): inner AdamW at the sites, outer Nesterov momentum here.

    With ``delta = sum_k w_k (theta - theta_k)``::

        m     <- beta m + delta
        theta <- theta - eta (delta + beta m)

    eta = 1 and beta = 0 is FedAvg.

    Parameters
    ----------
    outer_lr : float
        eta.
    momentum : float
        beta.
    weighted_by : str
        ``uniform`` (the paper's) or ``num-examples``.
    """

    def __init__(
        self,
        *,
        outer_lr: float = 0.7,
        momentum: float = 0.9,
        weighted_by: Literal["num-examples", "uniform"] = "uniform",
    ) -> None:
        super().__init__(weighted_by=weighted_by)
        self.outer_lr = outer_lr
        self.momentum = momentum
        self._momentum_name = ""
        self._m: ArrayRecord | None = None

    def aggregate(
        self, server_round: int, trained: Sequence[Record], weights: Sequence[float]
    ) -> Tensors:
        """Yield the weights after the outer step; the momentum is stored on the way."""
        if self.momentum:
            name = f"momentum-{server_round}"
            self._m = self.runtime.checkpoints.put(name, self._momenta(trained, weights))
            self._momentum_name = name
        return self._step(trained, weights)

    def _momenta(self, trained: Sequence[Record], weights: Sequence[float]) -> Tensors:
        old = self._m
        for name in self.arrays:
            delta = rules.combined_delta(name, self.arrays, trained, weights)
            before = None if old is None else old[name].numpy()
            yield name, rules.momentum_step(before, delta, self.momentum)

    def _step(self, trained: Sequence[Record], weights: Sequence[float]) -> Tensors:
        for name, array in self.arrays.items():
            delta = rules.combined_delta(name, self.arrays, trained, weights)
            m = delta if self._m is None else self._m[name].numpy()
            yield (
                name,
                rules.nesterov_step(array.numpy(), delta, m, self.outer_lr, self.momentum),
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the momentum."""
        names = [self._momentum_name] if self._momentum_name else []
        return {"tensors": names, "momentum": self._momentum_name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the momentum."""
        self._momentum_name = str(state["momentum"])
        if self._momentum_name:
            self._m = self.runtime.checkpoints.get(self._momentum_name)
