"""What the simulated sites learn: a small network, really trained on data that differs by site.

The task is next-token prediction given the last token and a domain. Every domain has its own
table of transition probabilities; a site draws most of its examples from its own domain. The
held-out loss is exact: the cross-entropy of the network against the tables, averaged over
domains, so that it has no sampling noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWN_AT_ONCE = 64  # batches

Array = NDArray[np.float32]
Weights = dict[str, Array]


@dataclass(frozen=True)
class LearnerConfig:
    """The network, its data and its optimizer."""

    vocabulary: int = 32  # Tokens; units of the hidden layer
    width: int = 64
    own_share: float = 0.85  # Share of a site's examples that come from its own domain
    # Of the Dirichlet distribution that the tables are drawn from: the smaller, the more
    # predictable the next token.
    concentration: float = 0.05
    batch: int = 64  # Examples per step
    lr: float = 2e-3  # AdamW with linear warm-up over the first steps of a site
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


class Learner:
    """The data of every site and the state of its inner optimizer.

    Parameters
    ----------
    sites : int
        As many domains.
    config : LearnerConfig
    seed : int
        Of tables, initial weights and batches.
    """

    def __init__(self, sites: int, config: LearnerConfig, seed: int) -> None:
        self.config, self.sites = config, sites
        rng = np.random.default_rng([seed, 1])
        v, alpha = config.vocabulary, config.concentration
        self.tables = rng.dirichlet(np.full(v, alpha), size=(sites, v))  # [domain, token, next]
        rows = np.arange(sites * v)[:, None]
        self._cumulative = (np.cumsum(self.tables.reshape(-1, v), axis=-1) + rows).ravel()
        self._rngs = [np.random.default_rng([seed, 2, k]) for k in range(sites)]
        self._initial = _initial(config, sites, np.random.default_rng([seed, 3]))
        size = sum(w.size for w in self._initial.values())
        zeros = np.zeros((sites, 2, size), dtype=np.float32)
        self._adam = [_Adam(first, second) for first, second in zeros]
        self._tokens = np.eye(v, dtype=np.float32)
        self._domains = np.eye(sites, dtype=np.float32)

    def initial(self) -> Weights:
        """Return the initial weights."""
        return {k: w.copy() for k, w in self._initial.items()}

    def floor(self) -> float:
        """Return the least possible held-out loss: the entropy of the tables, in nats."""
        p = np.maximum(self.tables, 1e-30)
        return float(-(p * np.log(p)).sum(-1).mean())

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
        """Train `steps` steps on a site's data; returns the weights and the mean loss.

        With `mu`, ``mu / 2 ||w - anchor||^2`` is added to the loss that is minimised
        (FedProx), not to the one that is returned. A `correction` is added to every gradient
        (SCAFFOLD), after it has been added to the sum in `gradients`.
        """
        w = _Flat.of(weights)
        g = _Flat.of(w.views)
        towards = _Flat.of(anchor).vector if mu and anchor is not None else None
        shift = _Flat.of({k: correction[k] for k in w.views}).vector if correction else None
        summed = _Flat.of(gradients or {k: np.zeros_like(a) for k, a in w.views.items()})
        total = 0.0
        for domain, token, label in self._batches(site, steps):
            total += self._backward(w.views, g.views, domain, token, label)
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

    def evaluate(self, weights: Mapping[str, Any]) -> float:
        """Return the exact held-out loss over all domains, in nats."""
        v = self.config.vocabulary
        domain = np.repeat(np.arange(self.sites), v)
        token = np.tile(np.arange(v), self.sites)
        _, logp = _forward({k: np.asarray(a) for k, a in weights.items()}, domain, token)
        return float(-(self.tables.reshape(-1, v) * logp).sum(-1).mean())

    def _batches(self, site: int, steps: int) -> Iterator[tuple[Any, Any, Any]]:
        """Yield `steps` batches."""
        for begun in range(0, steps, DRAWN_AT_ONCE):
            yield from zip(*self._draw(site, min(DRAWN_AT_ONCE, steps - begun)), strict=True)

    def _draw(self, site: int, steps: int) -> tuple[Any, Any, Any]:
        """Return domains, tokens and next tokens, each [steps, batch]."""
        c, rng = self.config, self._rngs[site]
        shape = (steps, c.batch)
        others = rng.integers(0, self.sites, size=shape)
        domain = np.where(rng.random(shape) < c.own_share, site, others)
        token = rng.integers(0, c.vocabulary, size=shape)
        # A row of the tables is an interval of length 1 of one sorted array.
        row = domain * c.vocabulary + token
        label = np.searchsorted(self._cumulative, row + rng.random(shape)) - row * c.vocabulary
        return domain, token, np.clip(label, 0, c.vocabulary - 1)

    def _backward(self, w: Weights, g: Weights, domain: Any, token: Any, label: Any) -> float:
        """Return the mean cross-entropy; its gradients are written into `g`."""
        (a, b), logp = _forward(w, domain, token)
        rows = np.arange(len(label))
        loss = float(-logp[rows, label].mean())
        d = np.exp(logp)
        d[rows, label] -= 1.0
        d /= len(label)
        db = (d @ w["out"].T) * (1 - b * b)
        da = (db @ w["hidden"].T) * (1 - a * a)
        np.matmul(self._tokens[token].T, da, out=g["token"])
        np.matmul(self._domains[domain].T, da, out=g["domain"])
        np.matmul(a.T, db, out=g["hidden"])
        np.matmul(b.T, d, out=g["out"])
        np.sum(d, axis=0, out=g["bias"])
        return loss

    def _update(self, w: Array, g: Array, adam: _Adam, scale: float) -> None:
        """Make a step of AdamW."""
        c = self.config
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


def _initial(c: LearnerConfig, domains: int, rng: np.random.Generator) -> Weights:
    def normal(*shape: int) -> Array:
        return np.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), dtype=np.float32)

    return {
        "token": normal(c.vocabulary, c.width),
        "domain": normal(domains, c.width),
        "hidden": normal(c.width, c.width),
        "out": normal(c.width, c.vocabulary),
        "bias": np.zeros(c.vocabulary, dtype=np.float32),
    }


def _forward(w: Weights, domain: Any, token: Any) -> tuple[tuple[Array, Array], Array]:
    """Return the activations and the log-probabilities of the next token."""
    a = np.tanh(w["token"][token] + w["domain"][domain])
    b = np.tanh(a @ w["hidden"])
    logits = b @ w["out"] + w["bias"]
    logits -= logits.max(axis=1, keepdims=True)
    return (a, b), logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
