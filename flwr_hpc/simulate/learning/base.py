"""What a learning task offers to the simulated sites, and AdamW for those with gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Weights = dict[str, Any]


class Learner(Protocol):
    """The data of every site, and what training on it does to weights."""

    target: float
    """Held-out loss that counts as reached where the scenario names none."""

    def initial(self) -> Weights:
        """Return the initial weights."""

    def train(
        self,
        site: int,
        weights: Weights,
        steps: int,
        lr_scale: float = 1.0,
        mu: float = 0.0,
        anchor: Weights | None = None,
        correction: Weights | None = None,
        gradients: Weights | None = None,
    ) -> tuple[Weights, float]:
        """Return the trained weights and the mean training loss.

        With `mu`, ``mu / 2 ||w - anchor||^2`` is added to the loss that is minimised (FedProx),
        not to the one that is returned. A `correction` is added to every gradient (SCAFFOLD),
        after that has been added to the sum in `gradients`.
        """

    def evaluate(self, weights: Weights) -> float:
        """Return the held-out loss over all domains."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up over the first steps of a site."""

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup_steps: int = 20


@dataclass
class _Adam:
    first: Array
    second: Array
    step: int = 0


@dataclass
class _Flat:
    """Tensors that are views of one vector: an optimizer step is a few operations on it."""

    vector: Array
    views: Weights

    @classmethod
    def of(cls, weights: Mapping[str, Array]) -> _Flat:
        """Return a copy of `weights`."""
        vector = np.concatenate([np.ravel(a) for a in weights.values()]).astype(np.float32)
        views, at = {}, 0
        for name, a in weights.items():
            views[name] = vector[at : at + a.size].reshape(a.shape)
            at += a.size
        return cls(vector, views)


class GradientLearner(ABC):
    """A model that is really trained: by AdamW, whose state stays at each site.

    Parameters
    ----------
    sites : int
        As many domains.
    config : OptimizerConfig
    initial : dict of str to float32 array
    """

    target: float

    def __init__(self, sites: int, config: OptimizerConfig, initial: Mapping[str, Array]) -> None:
        self.sites, self._optimizer, self._initial = sites, config, initial
        size = sum(w.size for w in initial.values())
        zeros = np.zeros((sites, 2, size), dtype=np.float32)
        self._adam = [_Adam(first, second) for first, second in zeros]

    @abstractmethod
    def batches(self, site: int, steps: int) -> Iterator[tuple[Any, ...]]:
        """Yield the next `steps` batches of a site's data."""

    @abstractmethod
    def backward(self, weights: Weights, gradients: Weights, *batch: Any) -> float:
        """Return a batch's mean loss; its gradients are written into `gradients`."""

    @abstractmethod
    def evaluate(self, weights: Mapping[str, Any]) -> float:
        """Return the held-out loss over all domains, in nats."""

    def initial(self) -> Weights:
        """Return the initial weights."""
        return {k: w.copy() for k, w in self._initial.items()}

    def train(
        self,
        site: int,
        weights: Mapping[str, Array],
        steps: int,
        lr_scale: float = 1.0,
        mu: float = 0.0,
        anchor: Mapping[str, Array] | None = None,
        correction: Mapping[str, Array] | None = None,
        gradients: Weights | None = None,
    ) -> tuple[Weights, float]:
        """Train `steps` steps on a site's data, see `Learner.train`."""
        w = _Flat.of(weights)
        g = _Flat.of(w.views)
        towards = _Flat.of(anchor).vector if mu and anchor is not None else None
        shift = _Flat.of({k: correction[k] for k in w.views}).vector if correction else None
        summed = _Flat.of(gradients or {k: np.zeros_like(a) for k, a in w.views.items()})
        total = 0.0
        for batch in self.batches(site, steps):
            total += self.backward(w.views, g.views, *batch)
            if gradients is not None:
                summed.vector += g.vector
            if shift is not None:
                g.vector += shift
            if towards is not None:
                g.vector += np.float32(mu) * (w.vector - towards)
            self._update(w.vector, g.vector, self._adam[site], lr_scale)
        if gradients is not None:
            gradients.update(summed.views)
        return w.views, total / max(1, steps)

    def _update(self, w: Array, g: Array, adam: _Adam, scale: float) -> None:
        """Make a step of AdamW."""
        c = self._optimizer
        adam.step += 1
        lr = scale * c.lr * min(1.0, adam.step / max(1, c.warmup_steps))
        b1, b2 = c.betas
        m, v = adam.first, adam.second
        m *= np.float32(b1)
        m += np.float32(1 - b1) * g
        v *= np.float32(b2)
        v += np.float32(1 - b2) * g * g
        root = np.sqrt(v)
        root *= np.float32((1 - b2**adam.step) ** -0.5)
        root += np.float32(1e-8)
        w *= np.float32(1 - lr * c.weight_decay)
        w -= np.float32(lr / (1 - b1**adam.step)) * m / root
