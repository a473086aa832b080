"""What averaging adapters apart leaves out, as low-rank factors to be added to the frozen weights.

With coefficients c_i that sum to 1 and the averages B and A of the sites' factors (FedEx-LoRA,
arXiv 2410.09432)::

    sum_i c_i B_i A_i - B A = sum_i c_i (B_i - B) (A_i - A) = U V

with U the columns c_i (B_i - B) and V the rows A_i - A: of rank (n - 1) r for n sites at most. Over
versions the factors are stacked and, as they lose rank, compressed: by QR of each and a singular
value decomposition of the small core between. Nothing of the frozen weight's size is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.parts.blocks import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"
ROUNDING = 1e-10  # of the largest singular value: what is below has come of rounding

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Factors:
    """A product U V, with U outputs x rank and V rank x inputs, float64."""

    u: Float64
    v: Float64


def adapters(names: Iterable[str]) -> list[str]:
    """Return what the names of each adapter's two tensors begin with; refuse other kinds of them.

    Empty if there are no adapters.
    """
    known = set(names)
    found = sorted(name.removesuffix(A) for name in known if name.endswith(A))
    rest = known - {prefix + end for prefix in found for end in (A, B)}
    if found and (rest or any(prefix + B not in known for prefix in found)):
        odd = min(rest, default=found[0])
        raise ValueError(
            f"'{odd}' is neither A nor B of a plain adapter of a linear layer. Adapters of "
            "embeddings, DoRA's magnitudes and frozen A cannot be averaged so: leave out "
            "model.lora.dora and model.lora.freeze_a"
        )
    if not found and any(name.endswith(B) for name in known):
        raise ValueError(
            "with model.lora.freeze_a=true the average is exact as it is. Use another strategy, "
            "e.g. strategy=fedavg_deadline"
        )
    return found


def residual(c: Sequence[float], a: Sequence[Tensor], b: Sequence[Tensor]) -> Factors:
    """Return the factors of ``sum_i c_i (B_i - B) (A_i - A)``.

    Parameters
    ----------
    c : sequence of float
        Sum to 1.
    a, b : sequence of array
        A_i (rank, inputs) and B_i (outputs, rank); or both less any matrix that is the same for
        all, or all with the opposite sign, as pseudo-gradients are.
    """
    rows, columns = _about_mean(c, a), _about_mean(c, b)
    weighed = [w * x for w, x in zip(c, columns, strict=True)]
    return Factors(np.concatenate(weighed, axis=1), np.concatenate(rows, axis=0))


def side_by_side(c: Sequence[float], a: Sequence[Tensor], b: Sequence[Tensor]) -> Factors:
    """Return the factors of ``sum_i c_i B_i A_i`` (FLoRA, arXiv 2409.05976)."""
    weighed = [w * x.astype(np.float64) for w, x in zip(c, b, strict=True)]
    return Factors(np.concatenate(weighed, axis=1), np.concatenate(a, axis=0).astype(np.float64))


def stacked(first: Factors, second: Factors) -> Factors:
    """Return the factors of the sum of two products."""
    return Factors(np.concatenate([first.u, second.u], 1), np.concatenate([first.v, second.v], 0))


def compressed(factors: Factors, rank: int | None = None) -> tuple[Factors, float]:
    """Return factors of no more rank than the product has, and the norm of what is left out.

    Parameters
    ----------
    factors : Factors
    rank : int or None
        With more than this the nearest product of this rank is taken. At least 1 is left.
    """
    qu, ru = np.linalg.qr(factors.u)
    qv, rv = np.linalg.qr(factors.v.T)
    left, values, right = np.linalg.svd(ru @ rv.T)
    real = int(np.sum(values > ROUNDING * values[0]))
    kept = max(1, real if rank is None else min(rank, real))
    root = np.sqrt(values[:kept])
    found = Factors(qu @ (left[:, :kept] * root), (root[:, None] * right[:kept]) @ qv.T)
    return found, math.sqrt(float(np.sum(values[kept:] ** 2)))


def _about_mean(c: Sequence[float], tensors: Sequence[Tensor]) -> list[Float64]:
    about = [x.astype(np.float64) - tensors[0] for x in tensors]  # so that equal ones differ by 0
    mean = sum(w * x for w, x in zip(c, about, strict=True))
    return [x - mean for x in about]
