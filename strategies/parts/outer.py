"""Outer optimizers: steps with momentum on the server, their tensors in the checkpoint store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from strategies.base.fields import Keep, StoredTensors
from strategies.parts import limits, rules
from strategies.parts.rules import Record, Tensor, Tensors


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

    def step(
        self,
        keep: Keep,
        theta: Record,
        delta_of: Callable[[str], Tensor],
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

    def _momenta(self, theta: Record, delta_of: Callable[[str], Tensor]) -> Tensors:
        old = self._m
        for name in theta:
            before = None if old is None else old[name].numpy()
            yield name, rules.momentum_step(before, delta_of(name), self.momentum)

    def _step(self, theta: Record, delta_of: Callable[[str], Tensor]) -> Tensors:
        for name, array in theta.items():
            m = None if self._m is None else self._m[name].numpy()
            if m is not None and not self.nesterov:
                yield name, rules.descend(array.numpy(), m, self.lr)
                continue
            delta = delta_of(name)
            m = delta if m is None else m
            yield name, rules.nesterov_step(array.numpy(), delta, m, self.lr, self.momentum)


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
        for name in theta:
            before = None if old is None else old[name].numpy()
            yield name, rules.momentum_step(before, rules.weighted_sum(name, deltas, rhos), beta)

    def _step(self, theta: Record, deltas: Sequence[Record], rhos: Sequence[float]) -> Tensors:
        pull = self.momentum * sum(rhos)
        for name, array in theta.items():
            move = rules.weighted_sum(name, deltas, rhos)
            if self._m is not None:
                move = move + move.dtype.type(pull) * self._m[name].numpy()
            yield name, rules.descend(array.numpy(), move, self.lr)
