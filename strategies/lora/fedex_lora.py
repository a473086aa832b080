"""FedEx-LoRA: rounds that average adapters exactly, by low-rank factors for the frozen weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flwr_hpc.protocol import RESIDUAL
from strategies.base.fields import StoredTensors
from strategies.engine.runtime import RunFailed
from strategies.engine.state import ExtraArrays, Plan, SiteState
from strategies.fedavg import FedAvg
from strategies.parts import limits, rules
from strategies.parts.blocks import Tensors
from strategies.parts.buffer import Update, deltas
from strategies.parts.lora import residual
from strategies.parts.lora.adapters import squared_norms
from strategies.parts.lora.residual import A, B, Factors
from strategies.parts.rules import Record


class FedExLora(FedAvg):
    """FedEx-LoRA (arXiv 2410.09432): FedAvg whose next model is the average of the sites' models.

    The factors are averaged apart, and what that leaves out goes into the frozen weights::

        A, B <- sum_i c_i A_i, sum_i c_i B_i
        W    <- W + s (sum_i c_i B_i A_i - B A),    s = alpha / r

    The server has no W: it keeps the sum over all versions as low-rank factors U V and sends them
    with each version. A site sets its frozen weights to those it loaded plus s U V, whatever it had
    before. Without adapters it is FedAvg.

    Parameters
    ----------
    rank : int or None
        U V is cut to this rank, and what is left out is told (None: it is kept whole; it grows by
        (n - 1) r with each version of n sites, to no more than the frozen weight's).
    **fedavg
        Those of `strategies.fedavg.FedAvg`; `outer_lr` is 1 and `late` is ``drop``.
    """

    persistent = ("residual",)
    needs_plain_adapters = True

    def __init__(self, *, rank: int | None = None, **fedavg: Any) -> None:
        super().__init__(**{"late": "drop", **fedavg})
        limits.positive("rank", rank)
        limits.one_of("late", self.late, ("drop",))
        for name, right in (("outer_lr", 1.0), ("average", None)):
            if fedavg.get(name, right) != right:
                raise ValueError(f"{name}={fedavg[name]} would make no average of models: leave it")
        self.rank = rank
        self.residual: StoredTensors | None = None  # U by the name of B, V by that of A
        self._facts: dict[str, Any] = {}

    def order(self, site: SiteState) -> Plan:
        """Send the factors with the weights."""
        if self._adapters() and not site.launcher:
            raise RunFailed(
                f"{site.facility} is an ordinary ClientApp, which cannot add factors to the "
                "weights under its adapters. This strategy trains with the launcher's sites alone"
            )
        return replace(super().order(site), extra_arrays=self.evaluation_arrays())

    def evaluation_arrays(self) -> ExtraArrays:
        """Send the factors of the newest version with its evaluation, too."""
        return {RESIDUAL: lambda: None if self.residual is None else rules.tensors(self.residual)}

    def merge(self, updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
        """Average the factors apart, and take what that leaves out into U V."""
        found = deltas(updates)
        shares = rules.normalised(list(weights))
        if prefixes := self._adapters():
            self.averaged(found, shares)
            self._lost, self._ranks = 0.0, 0
            pairs = self._next(prefixes, found, shares, self.residual)
            self.residual = self.keep_tensors("residual", pairs)
            self._facts = self._told()
        return rules.weighted_step(self.arrays, found, shares, self.outer_lr)

    def to_frozen(self, prefix: str, found: Sequence[Record], shares: Sequence[float]) -> Factors:
        """Return what of one adapter goes into the frozen weight with a version."""
        a, b = ([delta[prefix + end].numpy() for delta in found] for end in (A, B))
        return residual.residual(shares, a, b)

    def _adapters(self) -> list[str]:
        try:
            return residual.adapters(self.arrays)
        except ValueError as exc:
            raise RunFailed(f"{type(self).__name__}: {exc}") from None

    def _next(
        self,
        prefixes: Sequence[str],
        found: Sequence[Record],
        shares: Sequence[float],
        before: StoredTensors | None,
    ) -> Tensors:
        """Yield the factors after one more version, an adapter at a time."""
        for prefix in prefixes:
            new = self.to_frozen(prefix, found, shares)
            if before is not None:
                old = Factors(before[prefix + B].numpy(), before[prefix + A].numpy())
                new = residual.stacked(old, new)
            kept, lost = residual.compressed(new, self.rank)
            self._lost = math.hypot(self._lost, lost)
            self._ranks = max(self._ranks, len(kept.v))
            yield prefix + A, kept.v.astype(np.float32)
            yield prefix + B, kept.u.astype(np.float32)

    def _told(self) -> dict[str, Any]:
        """Return what is left of the inexactness, of how much, and the largest rank of U V."""
        assert self.combined is not None
        gap, whole = squared_norms(self.combined)
        size = math.sqrt(whole) or 1.0
        return {
            "lora_inexactness": self._lost / size,
            "lora_inexactness_removed": math.sqrt(max(gap, 0.0)) / size,
            "lora_residual_rank": self._ranks,
        }

    def adapter_facts(self) -> dict[str, Any]:
        """Return what is to tell of the version just made."""
        self.combined = None
        return self._facts
