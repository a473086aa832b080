"""Aggregation rules: pure functions, one tensor at a time, on numpy arrays.

No rule needs the whole model in memory: the arrays may be memory-mapped, and the functions over
records are generators of (name, tensor), where a large tensor is computed block by block as it is
read (`strategies.parts.blocks`). Notation: theta are the global weights,
``delta_k = theta_base - theta_k`` the pseudo-gradient of site k against the version it STARTED
from, tau its staleness in versions. Arithmetic is float32 (float64 where a tensor is); results
have the dtype of the global tensor.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from strategies.parts import limits
from strategies.parts.blocks import Lazy, Tensor, Tensors, as_is, blockwise, flat_blocks


class _Array(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def numpy(self) -> Tensor: ...


Record = Mapping[str, _Array]  # an ArrayRecord, lazy or not


# ---- one tensor -----------------------------------------------------------------------------


def _math(x: Tensor) -> Tensor:
    """Return `x` in the type the arithmetic runs in."""
    return np.asarray(x, dtype=np.result_type(np.float32, x.dtype)) if _real(x) else _f32(x)


def _real(x: Tensor) -> bool:
    return x.dtype in (np.dtype(np.float32), np.dtype(np.float64))


def _f32(x: Tensor) -> Tensor:
    return np.asarray(x, dtype=np.float32)


def _like(x: Tensor, reference: Tensor) -> Tensor:
    """Return `x` in the dtype of the global tensor (integers are rounded)."""
    if np.issubdtype(reference.dtype, np.integer):
        x = np.rint(x)
    return np.asarray(x, dtype=reference.dtype)


def normalised(weights: Sequence[float]) -> list[float]:
    """Return weights that sum to 1."""
    total = float(sum(weights))
    if not np.isfinite(total) or total <= 0 or min(weights) < 0:
        raise ValueError(f"weights must be finite, not negative and not all zero: {weights}")
    return [w / total for w in weights]


def weighted_mean(arrays: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``sum_k w_k x_k`` with the weights normalised (FedAvg, arXiv 1602.05629)."""
    total: Tensor | None = None
    for x, w in zip(arrays, normalised(weights), strict=True):
        term = _math(x) * np.float32(w) if x.dtype != np.float64 else x * w
        total = term if total is None else np.add(total, term, out=total)
    if total is None:
        raise ValueError("the mean of no arrays")
    return _like(total, arrays[0])


def pseudo_gradient(base: Tensor, trained: Tensor) -> Tensor:
    """Return ``delta = theta_base - theta_k``, never in less than float32."""
    return _math(base) - _math(trained)


def momentum_step(momentum: Tensor | None, delta: Tensor, beta: float) -> Tensor:
    """Return ``m <- beta m + delta``; without a momentum it starts at zero."""
    return delta if momentum is None else momentum * delta.dtype.type(beta) + delta


def nesterov_step(theta: Tensor, delta: Tensor, momentum: Tensor, lr: float, beta: float) -> Tensor:
    """Return ``theta - lr (delta + beta m)`` with the momentum already updated.

    Together with `momentum_step` the outer step of DiLoCo (arXiv 2311.08105); lr = 1 and
    beta = 0 give FedAvg.
    """
    kind = delta.dtype.type
    return _like(_math(theta) - kind(lr) * (delta + kind(beta) * momentum), theta)


def interpolated(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Return ``(1 - c) x + c y``, never in less than float32: small c would be rounded away."""
    here = _math(x)
    return np.asarray(here + here.dtype.type(c) * (_math(y) - here))


# ---- staleness ------------------------------------------------------------------------------


def _constant(tau: float) -> float:
    return 1.0


def _polynomial(tau: float, a: float = 0.5) -> float:
    return float((1.0 + tau) ** -a)


def _hinge(tau: float, a: float = 10.0, b: float = 4.0) -> float:
    return 1.0 if tau <= b else 1.0 / (a * (tau - b) + 1.0)


def _harmonic(tau: float, a: float = 1.0) -> float:
    return 1.0 / (1.0 + a * tau)


def _exponential(tau: float, a: float = 1.0) -> float:
    return math.exp(-a * tau)


STALENESS: dict[str, Callable[..., float]] = {
    "constant": _constant,
    "polynomial": _polynomial,
    "hinge": _hinge,
    "harmonic": _harmonic,
    "exponential": _exponential,
}


def staleness_weight(kind: str, tau: float, **parameters: float) -> float:
    """Return s(tau): how much an update counts that started `tau` versions ago.

    ``constant`` 1; ``polynomial`` (1 + tau)^-a, a = 0.5 being FedBuff's 1/sqrt(1 + tau);
    ``hinge`` 1 up to b, then 1 / (a (tau - b) + 1), a = 10, b = 4 (FedAsync, arXiv 1903.03934);
    ``harmonic`` 1 / (1 + a tau) and ``exponential`` exp(-a tau), a = 1 (FedQueue's code).
    """
    if kind not in STALENESS:
        raise ValueError(f"staleness '{kind}' is not known. Valid: {', '.join(STALENESS)}")
    if tau < 0:
        raise ValueError(f"staleness cannot be negative: {tau}")
    return STALENESS[kind](tau, **parameters)


def staleness_rule(
    kind: str, *, a: float | None = None, b: float | None = None
) -> Callable[[float], float]:
    """Return s(tau) as a function of tau alone; a parameter that is None has its default.

    The kinds are those of `staleness_weight`.
    """
    if kind not in STALENESS:
        raise ValueError(f"staleness='{kind}' is not known. Valid: {', '.join(STALENESS)}")
    given = {name: value for name, value in {"a": a, "b": b}.items() if value is not None}
    takes = list(inspect.signature(STALENESS[kind]).parameters)[1:]
    for name, value in given.items():
        if name not in takes:
            valid = ", ".join(takes) or "no parameter"
            raise ValueError(f"{name}={value} does not go with staleness='{kind}', it has: {valid}")
        limits.not_negative(name, value)
    return lambda tau: staleness_weight(kind, tau, **given)


# ---- whole records, tensor by tensor --------------------------------------------------------


def tensors(record: Record) -> Tensors:
    """Yield the (name, tensor) pairs of a record, loading one at a time."""
    for name, array in record.items():
        yield name, as_is(array)


def record_mean(records: Sequence[Record], weights: Sequence[float]) -> Tensors:
    """Yield the weighted mean of records."""
    for name in records[0]:
        yield name, mean_of(name, records, weights)


def record_delta(base: Record, trained: Record) -> Tensors:
    """Yield the pseudo-gradient of a record against its base."""
    for name, array in base.items():
        yield name, blockwise(pseudo_gradient, array, trained[name])


def mean_of(name: str, records: Sequence[Record], weights: Sequence[float]) -> Lazy:
    """Return the weighted mean of one tensor."""
    return blockwise(lambda *xs: weighted_mean(xs, weights), *(r[name] for r in records))


def combined_delta(
    name: str,
    base: Record,
    trained: Sequence[Record],
    weights: Sequence[float],
    mean: Callable[[Sequence[Tensor], Sequence[float]], Tensor] = weighted_mean,
) -> Lazy:
    """Return ``sum_k w_k (theta - theta_k)`` of one tensor, weights normalised, or another mean."""

    def rule(theta: Tensor, *xs: Tensor) -> Tensor:
        return mean([pseudo_gradient(theta, x) for x in xs], weights)

    return blockwise(rule, base[name], *(r[name] for r in trained))


def sender_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``sum_k w_k delta_k / sum_k w_k [delta_k != 0]``, value by value; zero where none is.

    What a sparse update leaves out has no part in the mean, as in CCLoco's code (see
    `strategies.diloco`).
    """
    total = weighted_sum(deltas, weights)
    sent = weighted_sum([delta != 0 for delta in deltas], weights)
    return np.divide(total, sent, out=total, where=sent > 0)


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``sum_k w_k delta_k``; the weights are taken as they are."""
    total = np.zeros(deltas[0].shape, dtype=_math(deltas[0]).dtype)
    for delta, weight in zip(deltas, weights, strict=True):
        total += total.dtype.type(weight) * delta
    return total


def weighted_step(
    theta: Record, deltas: Sequence[Record], weights: Sequence[float], lr: float = 1.0
) -> Tensors:
    """Yield ``theta - lr sum_k w_k delta_k``; the weights are taken as they are.

    Weights s(tau_k) / K are FedBuff's (arXiv 2106.06639): those below 1 / K shorten the step.
    """

    def rule(here: Tensor, *found: Tensor) -> Tensor:
        return descend(here, weighted_sum(found, weights), lr)

    for name, array in theta.items():
        yield name, blockwise(rule, array, *(delta[name] for delta in deltas))


def weighted_pull(
    theta: Record, trained: Sequence[Record], weights: Sequence[float], lr: float = 1.0
) -> Tensors:
    """Yield ``theta - lr sum_k w_k (theta - theta_k)``; the weights are taken as they are."""

    def rule(here: Tensor, *xs: Tensor) -> Tensor:
        total = np.zeros(here.shape, dtype=_math(here).dtype)
        for x, weight in zip(xs, weights, strict=True):
            total += total.dtype.type(weight) * pseudo_gradient(here, x)
        return descend(here, total, lr)

    for name, array in theta.items():
        yield name, blockwise(rule, array, *(record[name] for record in trained))


def stepped(theta: Record, base: Record, trained: Record, scale: float) -> Tensors:
    """Yield ``theta - scale (base - trained)``."""

    def rule(here: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return descend(here, pseudo_gradient(start, end), scale)

    for name, array in theta.items():
        yield name, blockwise(rule, array, base[name], trained[name])


def mixed(theta: Record, trained: Record, alpha: float) -> Tensors:
    """Yield ``(1 - alpha) theta + alpha theta_k`` (FedAsync, arXiv 1903.03934)."""

    def rule(here: Tensor, there: Tensor) -> Tensor:
        kind = _math(here).dtype.type
        return _like(kind(1.0 - alpha) * _math(here) + kind(alpha) * _math(there), here)

    for name, array in theta.items():
        yield name, blockwise(rule, array, trained[name])


def descend(theta: Tensor, direction: Tensor, lr: float = 1.0) -> Tensor:
    """Return ``theta - lr direction`` in the dtype of theta."""
    return _like(_math(theta) - direction.dtype.type(lr) * direction, theta)


# ---- one tensor as a whole ------------------------------------------------------------------


def radial_directional(name: str, deltas: Sequence[Record], weights: Sequence[float]) -> Lazy:
    """Return ``(sum w ||delta|| / sum w) phi(sum w phi(delta))``, phi the unit vector.

    Norms and directions are averaged apart, so that sites that pull in different directions do
    not shorten the step (Decoupled DiLoCo, arXiv 2604.21428). All zero: zero.
    """
    found, share = [delta[name] for delta in deltas], normalised(weights)
    norms = [_norm(as_is(delta)) for delta in found]

    def direction(*xs: Tensor) -> Tensor:
        total = np.zeros(xs[0].shape, dtype=_math(xs[0]).dtype)
        for x, norm, w in zip(xs, norms, share, strict=True):
            if norm > 0:
                total += total.dtype.type(w / norm) * _math(x)
        return total

    length = _norm(blockwise(direction, *found))
    radius = sum(w * n for w, n in zip(share, norms, strict=True))
    scale = radius / length if length > 0 else 0.0

    def scaled(*xs: Tensor) -> Tensor:
        mean = direction(*xs)
        return np.asarray(mean * mean.dtype.type(scale))

    return blockwise(scaled, *found)


def _norm(array: Lazy) -> float:
    return math.hypot(*(float(np.linalg.norm(_math(block))) for block in flat_blocks(array)))
