"""How far the average of LoRA adapters is from the adapter of the average.

An adapter adds ``B A`` to a frozen weight. Averaging A and B apart makes ``(sum c_i B_i)(sum c_i
A_i)``, which is not the average ``sum c_i B_i A_i`` of what the sites have trained (FedEx-LoRA,
arXiv 2410.09432; FFA-LoRA, arXiv 2403.12313). With coefficients that sum to 1 the two differ by ::

    sum_i c_i B_i A_i - B A = sum_i c_i (B_i - B) (A_i - A)

so that the difference is exactly 0 where all A_i are the same. Norms come from Gram matrices of the
factors, ``||sum_i c_i B_i A_i||^2 = sum_ij c_i c_j <B_i^T B_j, A_i A_j^T>``: nothing of the size of
the frozen weight is ever made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.parts import rules
from strategies.parts.blocks import Tensor
from strategies.parts.rules import Record

CHUNK = 4096  # columns of all factors that are in float64 at a time

Point = Callable[[str], Tensor]  # Of a model's tensors by name


@dataclass(frozen=True)
class Combination:
    """An average of models as a rule takes it, tensor by tensor.

    ``names`` are the tensors of the model, ``coefficients`` those of ``points``, which sum to 1.
    """

    names: Iterable[str]
    points: Sequence[Point]
    coefficients: Sequence[float]


def point(record: Record) -> Point:
    """Return a record, maybe lazy, as a point."""
    return lambda name: record[name].numpy()


def difference(base: Record, trained: Record) -> Point:
    """Return the pseudo-gradient of a record against its base, as a point."""
    return lambda name: rules.pseudo_gradient(base[name].numpy(), trained[name].numpy())


def mean_of(models: Sequence[Record], weights: Sequence[float]) -> Combination:
    """Return the weighted mean of models."""
    total = math.fsum(weights)
    return Combination(list(models[0]), [point(m) for m in models], [w / total for w in weights])


def mixture_of(theta: Record, models: Sequence[Record], weights: Sequence[float]) -> Combination:
    """Return ``(1 - sum w_k) theta + sum_k w_k theta_k``."""
    rest = 1.0 - math.fsum(weights)
    return Combination(list(theta), [point(theta), *map(point, models)], [rest, *weights])


def step_of(theta: Record, deltas: Sequence[Point], weights: Sequence[float]) -> Combination:
    """Return ``theta - sum_k w_k delta_k``, for sites that stand at ``theta - delta_k``."""
    points = [_moved(point(theta), delta) for delta in deltas]
    rest = 1.0 - math.fsum(weights)
    return Combination(list(theta), [point(theta), *points], [rest, *weights])


def inexactness(average: Combination) -> float | None:
    """Return ``||sum c_i B_i A_i - B A||_F / ||sum c_i B_i A_i||_F`` over all adapters.

    None if there are no adapters. Where only B travels, A is frozen and the average exact: 0.
    """
    if not has_adapters(average.names):
        return None
    apart, whole = squared_norms(average)
    if apart <= 0.0:
        return 0.0
    return math.sqrt(apart / whole) if whole > 0.0 else math.inf


def squared_norms(average: Combination) -> tuple[float, float]:
    """Return ``||sum c_i B_i A_i - B A||^2`` and ``||sum c_i B_i A_i||^2``, of all adapters."""
    names = set(average.names)
    c = np.asarray(average.coefficients, dtype=np.float64)
    apart = whole = 0.0
    for a_name in sorted(names):
        b_name = _partner(a_name)
        if b_name in names and b_name != a_name:
            a = [_rows(read(a_name)) for read in average.points]
            b = [_columns(read(b_name)) for read in average.points]
            gap, product = _squared_norms(a, b, c)
            apart, whole = apart + gap, whole + product
    return apart, whole


def has_adapters(names: Iterable[str]) -> bool:
    """Return whether there are LoRA's B among the tensors."""
    return any(re.search(r"\.lora_(embedding_)?B\b", name) for name in names)


def facts(average: Combination | str, model: Iterable[str]) -> dict[str, Any]:
    """Return what is told of the average that a version comes from; nothing without adapters.

    Parameters
    ----------
    average : Combination or str
        Or why it is not known.
    model : iterable of str
        Names of the model's tensors.
    """
    if not has_adapters(model):
        return {}
    if isinstance(average, str):
        return {"lora_inexactness": None, "lora_inexactness_unknown": average}
    return {"lora_inexactness": inexactness(average)}


def _moved(theta: Point, delta: Point) -> Point:
    return lambda name: np.asarray(theta(name) - delta(name))


def _partner(a_name: str) -> str:
    return re.sub(r"(\.lora_(?:embedding_)?)A\b", r"\1B", a_name)


def _rows(a: Tensor) -> Tensor:
    """Return A as rank x inputs (a convolution's has further axes)."""
    return a.reshape(len(a), -1)


def _columns(b: Tensor) -> Tensor:
    """Return the transpose of B: rank x outputs."""
    return b.reshape(len(b), -1).T


def _squared_norms(
    a: Sequence[Tensor], b: Sequence[Tensor], c: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the squared norms of the difference and of the exact average of one adapter."""
    pairs = np.repeat(np.repeat(np.outer(c, c), len(a[0]), axis=0), len(a[0]), axis=1)
    (a_centred, a_plain), (b_centred, b_plain) = _grams(a, c), _grams(b, c)
    gap = float(np.sum(pairs * a_centred * b_centred))
    return gap, float(np.sum(pairs * a_plain * b_plain))


def _grams(
    factors: Sequence[Tensor], c: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the Gram matrices of stacked factors: about their average, and as they are."""
    size = len(factors) * len(factors[0])
    centred, plain = np.zeros((size, size)), np.zeros((size, size))
    for start in range(0, factors[0].shape[1], CHUNK):
        block = np.stack([f[:, start : start + CHUNK].astype(np.float64) for f in factors])
        about = block - block[0]  # first: equal factors then differ by 0, not by rounding
        about = about - np.tensordot(c, about, axes=1)
        for gram, part in ((centred, about), (plain, block)):
            stacked = part.reshape(size, -1)
            gram += stacked @ stacked.T
    return centred, plain
