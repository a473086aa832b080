"""Central differential privacy: noise for a sum of clipped updates, and what it is worth."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord

from strategies.parts import limits, rules
from strategies.parts.blocks import Lazy, Tensor, blockwise, made_record

CELL = 1 << 14  # numbers that are drawn together


@dataclass(frozen=True)
class Gaussian:
    """Independent normal noise of a tensor's shape, read in ranges: the same ones each time."""

    seed: tuple[int, ...]
    stddev: float
    shape: tuple[int, ...]
    dtype = np.dtype(np.float64)

    def numpy(self) -> Tensor:
        """Return all of it."""
        return self.reader()(slice(0, math.prod(self.shape))).reshape(self.shape)

    def reader(self) -> Callable[[slice], Tensor]:
        """Return what draws the cells that a range lies in."""

        def read(part: slice) -> Tensor:
            first = part.start // CELL
            cells = [self._cell(k) for k in range(first, -(-part.stop // CELL))]
            drawn = np.concatenate([np.empty(0), *cells])
            return drawn[part.start - first * CELL : part.stop - first * CELL]

        return read

    def _cell(self, number: int) -> Tensor:
        return self.stddev * np.random.default_rng([*self.seed, number]).standard_normal(CELL)


Noise = Callable[[str, Array], Gaussian]  # ``noise(name, like)``


def gaussian(seed: int, stddev: float) -> Noise:
    """Return what makes noise for tensors, another for each name."""

    def of(name: str, like: Array) -> Gaussian:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])
        return Gaussian((seed, key), stddev, tuple(like.shape))

    return of


def with_noise(base: ArrayRecord, trained: ArrayRecord, scale: float, noise: Noise) -> ArrayRecord:
    """Return ``base + scale (trained - base) + noise``, made in blocks when it is read."""

    def rule(start: Tensor, end: Tensor, drawn: Tensor) -> Tensor:
        direction = rules.pseudo_gradient(start, end)
        direction = direction * direction.dtype.type(scale)
        return rules.descend(start, direction + drawn.astype(direction.dtype))

    def make(name: str) -> Lazy:
        return blockwise(rule, base[name], trained[name], noise(name, base[name]))

    return made_record(base, make)


def noise_apart(noise: float, count_noise: float) -> float:
    """Return what is left of a noise multiplier for the updates, beside that of a count.

    A noisy sum (z_s) and a noisy count of bits of 1/2 (``2 sigma_b``) are together as private as
    one release of ``z = (z_s^-2 + (2 sigma_b)^-2)^-1/2`` (arXiv 1905.03871, theorem 1).
    """
    if not noise:
        return 0.0
    if noise >= 2.0 * count_noise:
        raise ValueError(
            f"count_noise={count_noise:g} must be above noise_multiplier / 2 = {noise / 2:g}: the "
            "noisy count alone would be less private than the whole is to be"
        )
    return float((noise**-2 - (2.0 * count_noise) ** -2) ** -0.5)


def next_clip(clip: float, within: float, quantile: float, rate: float) -> float:
    """Return ``C exp(-eta (b - gamma))``: b of the updates were no longer than C."""
    return clip * math.exp(-rate * (within - quantile))


def epsilon(noise: float, releases: int, delta: float) -> float:
    """Return the epsilon of so many Gaussian releases at a delta; infinite without noise.

    All of them together are one Gaussian mechanism of the noise ``z / sqrt(T)`` (arXiv 1905.02383,
    corollary 2), whose exact curve, with ``mu = sqrt(T) / z``, is (arXiv 1805.06530, theorem 8)::

        delta(eps) = Phi(mu / 2 - eps / mu) - exp(eps) Phi(-mu / 2 - eps / mu)

    Every site is taken to be in every release: sampling sites at random would make it smaller.
    """
    limits.positive_share("delta", delta)
    if not releases:
        return 0.0
    if not noise:
        return math.inf
    mu = math.sqrt(releases) / noise
    low, high = 0.0, 1.0
    while _delta(high, mu) > delta:
        low, high = high, 2.0 * high
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return high


def _delta(eps: float, mu: float) -> float:
    second = _log_normal_cdf(-mu / 2.0 - eps / mu) + eps  # exp(eps) alone may be too large
    return math.exp(_log_normal_cdf(mu / 2.0 - eps / mu)) - math.exp(min(second, 0.0))


def _log_normal_cdf(x: float) -> float:
    if x > -30.0:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2.0)))
    return -0.5 * x * x - math.log(-x * math.sqrt(2.0 * math.pi)) - 1.0 / (x * x)
