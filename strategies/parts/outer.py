"""Outer optimizers: Nesterov steps on the server, their tensors in the checkpoint store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord

from strategies.engine.runtime import CheckpointStore
from strategies.parts import limits, rules
from strategies.parts.rules import Record, Tensor, Tensors


def _check(lr: float, momentum: float) -> None:
    limits.positive("outer_lr", lr)
    limits.share("momentum", momentum)


class Nesterov:
    """``m <- beta m + delta``, ``theta <- theta - eta (delta + beta m)``.

    Parameters
    ----------
    lr, momentum : float
        eta > 0 and beta in [0, 1), a strategy's `outer_lr` and `momentum`.

    Raises
    ------
    ValueError
        Outside these ranges.
    """

    def __init__(self, lr: float, momentum: float) -> None:
        _check(lr, momentum)
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


class PartialNesterov:
    """A Nesterov step for updates of a part of the sites, and the average of what it makes.

    Updates delta_k with weights rho_k make a step of the part ``rho = sum_k rho_k`` of a round::

        d     = sum_k rho_k delta_k
        m     <- beta^rho m + d
        theta <- theta - eta (d + beta rho m)
        mean  <- (1 - c) mean + c theta,   c = min(1, (1 + gamma) rho / (t + gamma))

    with t the sum of all rho so far. The mean (polynomial-decay averaging, arXiv 1212.1824) is
    what steps decay to that grow smaller, without a schedule that knows how long the run will
    be: the larger gamma, the more recent the weights in it.

    Parameters
    ----------
    lr, momentum : float
        eta > 0 and beta in [0, 1), a strategy's `outer_lr` and `momentum`.
    gamma : float or None
        Not negative, a strategy's `average`; None: no mean is kept.

    Raises
    ------
    ValueError
        Outside these ranges.
    """

    def __init__(self, lr: float, momentum: float, gamma: float | None) -> None:
        _check(lr, momentum)
        limits.not_negative("average", gamma)
        self.lr, self.momentum, self.gamma = lr, momentum, gamma
        self._held: dict[str, tuple[str, ArrayRecord]] = {}  # momentum and mean
        self._rounds = 0.0  # t

    @property
    def mean(self) -> ArrayRecord | None:
        """The average; None if there is none yet."""
        return self._held["mean"][1] if "mean" in self._held else None

    def step(
        self,
        store: CheckpointStore,
        theta: Record,
        deltas: Sequence[Record],
        rhos: Sequence[float],
        version: int,
    ) -> Tensors:
        """Yield the tensors of the next version; momentum and mean are stored on the way.

        Parameters
        ----------
        store : CheckpointStore
        theta : Record
            The global weights.
        deltas, rhos : sequence
            Pseudo-gradients and their weights, which are not normalised.
        version : int
            Of the weights that come out.
        """
        rho = sum(rhos)
        if self.momentum:
            self._put(store, "momentum", version, self._momenta(theta, deltas, rhos))
        self._rounds += rho
        if self.gamma is not None:
            c = min(1.0, (1.0 + self.gamma) * rho / (self._rounds + self.gamma))
            self._put(
                store, "mean", version, self._means(theta, self._step(theta, deltas, rhos), c)
            )
        return self._step(theta, deltas, rhos)

    def _put(self, store: CheckpointStore, kind: str, version: int, made: Tensors) -> None:
        name = f"{kind}-{version}"
        self._held[kind] = name, store.put(name, made)

    def _momenta(self, theta: Record, deltas: Sequence[Record], rhos: Sequence[float]) -> Tensors:
        old, beta = self._held.get("momentum"), self.momentum ** sum(rhos)
        for name in theta:
            before = None if old is None else old[1][name].numpy()
            yield name, rules.momentum_step(before, rules.weighted_sum(name, deltas, rhos), beta)

    def _step(self, theta: Record, deltas: Sequence[Record], rhos: Sequence[float]) -> Tensors:
        pull = self.momentum * sum(rhos)
        for name, array in theta.items():
            move = rules.weighted_sum(name, deltas, rhos)
            if self.momentum:
                move = move + move.dtype.type(pull) * self._held["momentum"][1][name].numpy()
            yield name, rules.descend(array.numpy(), move, self.lr)

    def _means(self, theta: Record, new: Tensors, c: float) -> Tensors:
        old = self.mean if self.mean is not None else theta
        for name, tensor in new:
            yield name, rules.interpolated(old[name].numpy(), tensor, c)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of momentum and mean, and t."""
        names = {kind: name for kind, (name, _) in self._held.items()}
        return {"tensors": list(names.values()), "held": names, "rounds": self._rounds}

    def load_state_dict(self, state: Mapping[str, Any], store: CheckpointStore) -> None:
        """Load momentum and mean."""
        self._held = {kind: (name, store.get(name)) for kind, name in state["held"].items()}
        self._rounds = float(state["rounds"])
