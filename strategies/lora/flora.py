"""FLoRA: rounds whose adapters are stacked into the frozen weights, and begin anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np

from strategies.lora.fedex_lora import FedExLora
from strategies.parts.blocks import Tensor, Tensors
from strategies.parts.buffer import Update
from strategies.parts.lora import residual
from strategies.parts.lora.residual import A, B, Factors
from strategies.parts.rules import Record


class FLoRA(FedExLora):
    """FLoRA (arXiv 2409.05976): the sites' adapters side by side are the round's update.

    They go into the frozen weights whole, and the next round begins with new ones::

        W <- W + s sum_i c_i B_i A_i,    A <- drawn anew,    B <- 0,    s = alpha / r

    The next model is the average of the sites' models, as with `FedExLora`, whose way of keeping
    the sum as factors U V this is; but no factor is averaged, so sites may have adapters of
    unlike ranks (`facilities.NAME.lora_r`).

    Parameters
    ----------
    seed : int
        Of the draws of A: uniform within 1 / sqrt(inputs), as peft's.
    **fedex
        Those of `FedExLora`. U V grows by n r with each version of n sites.
    """

    takes_unlike_ranks = True

    def __init__(self, *, seed: int = 0, **fedex: Any) -> None:
        super().__init__(**fedex)
        self.seed = seed

    def merge(self, updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
        """Stack the factors into U V; draw A anew, and B is 0."""
        merged = super().merge(updates, weights)
        return self._anew() if self._adapters() else merged

    def to_frozen(self, prefix: str, found: Sequence[Record], shares: Sequence[float]) -> Factors:
        """Return ``sum_i c_i B_i A_i`` of one adapter."""
        a, b = ([self._trained(prefix + end, delta) for delta in found] for end in (A, B))
        return residual.side_by_side(shares, a, b)

    def _trained(self, name: str, delta: Record) -> Tensor:
        return np.asarray(self.arrays[name].numpy() - delta[name].numpy())

    def _anew(self) -> Tensors:
        for name, array in self.arrays.items():
            shape = array.numpy().shape
            if name.endswith(B):
                yield name, np.zeros(shape, np.float32)
            else:
                draw = np.random.default_rng([self.seed, self.version, crc32(name.encode())])
                bound = 1.0 / math.sqrt(shape[1])
                yield name, draw.uniform(-bound, bound, shape).astype(np.float32)
