"""The outer optimizer: a Nesterov step on the server, its momentum in the checkpoint store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord

from strategies import rules
from strategies.rules import Record, Tensor, Tensors
from strategies.runtime import CheckpointStore

__all__ = ["Nesterov"]


class Nesterov:
    """``m <- beta m + delta``, ``theta <- theta - eta (delta + beta m)``.

    Parameters
    ----------
    lr, momentum : float
        eta and beta.
    """

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.momentum = lr, momentum
        self._name = ""
        self._m: ArrayRecord | None = None

    def step(
        self,
        store: CheckpointStore,
        theta: Record,
        delta_of: Callable[[str], Tensor],
        version: int,
    ) -> Tensors:
        """Return the tensors of the next version; the new momentum is stored on the way.

        Parameters
        ----------
        store : CheckpointStore
        theta : Record
            The global weights.
        delta_of : callable
            The merged pseudo-gradient of a tensor, by its name; called twice if there is
            momentum, so that no more than a tensor is in memory.
        version : int
            Of the weights that come out.
        """
        if self.momentum:
            name = f"momentum-{version}"
            self._m = store.put(name, self._momenta(theta, delta_of))
            self._name = name
        return self._step(theta, delta_of)

    def _momenta(self, theta: Record, delta_of: Callable[[str], Tensor]) -> Tensors:
        old = self._m
        for name in theta:
            before = None if old is None else old[name].numpy()
            yield name, rules.momentum_step(before, delta_of(name), self.momentum)

    def _step(self, theta: Record, delta_of: Callable[[str], Tensor]) -> Tensors:
        for name, array in theta.items():
            delta = delta_of(name)
            m = delta if self._m is None else self._m[name].numpy()
            yield name, rules.nesterov_step(array.numpy(), delta, m, self.lr, self.momentum)

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the momentum."""
        return {"tensors": [self._name] if self._name else [], "momentum": self._name}

    def load_state_dict(self, state: Mapping[str, Any], store: CheckpointStore) -> None:
        """Load the momentum."""
        self._name = str(state["momentum"])
        self._m = store.get(self._name) if self._name else None
