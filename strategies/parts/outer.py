"""Outer optimizers: steps with momentum on the server, their tensors in the checkpoint store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from strategies.base.fields import Keep, StoredTensors
from strategies.parts import limits, rules
from strategies.parts.blocks import Lazy, Tensor, Tensors, blockwise
from strategies.parts.rules import Record


def _check(lr: float, momentum: float) -> None:
    limits.positive("outer_lr", lr)
    limits.share("momentum", momentum)


class OuterSGD:
    """``m <- beta m + delta``, then a step along ``delta + beta m``, or along m.

    ``theta <- theta - eta (delta + beta m)`` is Nesterov's, ``theta <- theta - eta m`` plain
    momentum. Without momentum both are ``theta - eta delta``.

    Parameters
    ----------
    lr, momentum : float
        eta > 0 and beta in [0, 1), a strategy's `outer_lr` and `momentum`.
    nesterov : bool
        Else momentum is plain.
    """

    persistent = ("_m",)

    def __init__(self, lr: float, momentum: float, nesterov: bool = True) -> None:
        _check(lr, momentum)
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self._m: StoredTensors | None = None

    def models_kept(self, sites: int) -> int:
        """Return 2 if there is momentum: the former one is deleted when the new one is kept."""
        return 2 * (self.momentum > 0)

    def step(
        self,
        keep: Keep,
        theta: Record,
        delta_of: Callable[[str], Lazy],
    ) -> Tensors:
        """Return the tensors of the next version; the new momentum is stored on the way.

        Parameters
        ----------
        keep : callable
            The strategy's `keep_tensors`.
        theta : Record
            The global weights.
        delta_of : callable
            The merged pseudo-gradient of a tensor, by its name; called twice if there is
            momentum, so that no more than a tensor is in memory.
        """
        if self.momentum:
            self._m = keep("momentum", self._momenta(theta, delta_of))
        return self._step(theta, delta_of)

    def _momenta(self, theta: Record, delta_of: Callable[[str], Lazy]) -> Tensors:
        def rule(delta: Tensor, before: Tensor | None = None) -> Tensor:
            return rules.momentum_step(before, delta, self.momentum)

        old = self._m
        for name in theta:
            before = [] if old is None else [old[name]]
            yield name, blockwise(rule, delta_of(name), *before)

    def _step(self, theta: Record, delta_of: Callable[[str], Lazy]) -> Tensors:
        def plain(here: Tensor, m: Tensor) -> Tensor:
            return rules.descend(here, m, self.lr)

        def nesterov(here: Tensor, delta: Tensor, m: Tensor | None = None) -> Tensor:
            m = delta if m is None else m
            return rules.nesterov_step(here, delta, m, self.lr, self.momentum)

        for name, array in theta.items():
            m = [] if self._m is None else [self._m[name]]
            if m and not self.nesterov:
                yield name, blockwise(plain, array, *m)
            else:
                yield name, blockwise(nesterov, array, delta_of(name), *m)


class PartialNesterov:
    """A Nesterov step for updates of a part of the sites.

    Updates delta_k with weights rho_k make a step of the part ``rho = sum_k rho_k`` of a round::

        d     = sum_k rho_k delta_k
        m     <- beta^rho m + d
        theta <- theta - eta (d + beta rho m)

    Parameters
    ----------
    lr, momentum : float
        eta > 0 and beta in [0, 1), a strategy's `outer_lr` and `momentum`.

    Attributes
    ----------
    rho : float
        Of the last step.
    """

    persistent = ("_m",)

    def __init__(self, lr: float, momentum: float) -> None:
        _check(lr, momentum)
        self.lr, self.momentum, self.rho = lr, momentum, 0.0
        self._m: StoredTensors | None = None

    def models_kept(self, sites: int) -> int:
        """Return 2 if there is momentum: the former one is deleted when the new one is kept."""
        return 2 * (self.momentum > 0)

    def step(
        self,
        keep: Keep,
        theta: Record,
        deltas: Sequence[Record],
        rhos: Sequence[float],
    ) -> Tensors:
        """Yield the tensors of the next version; the momentum is stored on the way.

        Parameters
        ----------
        keep : callable
            The strategy's `keep_tensors`.
        theta : Record
            The global weights.
        deltas, rhos : sequence
            Pseudo-gradients and their weights, which are not normalised.
        """
        self.rho = sum(rhos)
        if self.momentum:
            self._m = keep("momentum", self._momenta(theta, deltas, rhos))
        return self._step(theta, deltas, rhos)

    def _momenta(self, theta: Record, deltas: Sequence[Record], rhos: Sequence[float]) -> Tensors:
        old, beta = self._m, self.momentum ** sum(rhos)

        def rule(*found: Tensor) -> Tensor:
            updates, before = found[: len(deltas)], found[len(deltas) :]
            move = rules.weighted_sum(updates, rhos)
            return rules.momentum_step(before[0] if before else None, move, beta)

        for name in theta:
            before = [] if old is None else [old[name]]
            yield name, blockwise(rule, *(delta[name] for delta in deltas), *before)

    def _step(self, theta: Record, deltas: Sequence[Record], rhos: Sequence[float]) -> Tensors:
        pull = self.momentum * sum(rhos)

        def rule(here: Tensor, *found: Tensor) -> Tensor:
            updates, m = found[: len(deltas)], found[len(deltas) :]
            move = rules.weighted_sum(updates, rhos)
            if m:
                move = move + move.dtype.type(pull) * m[0]
            return rules.descend(here, move, self.lr)

        for name, array in theta.items():
            m = [] if self._m is None else [self._m[name]]
            yield name, blockwise(rule, array, *(delta[name] for delta in deltas), *m)
