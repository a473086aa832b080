"""A small network on tables of transition probabilities that differ by domain.

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

from flwr_hpc.simulate.learning.base import Array, GradientLearner, OptimizerConfig, Weights

DRAWN_AT_ONCE = 64  # batches


@dataclass(frozen=True)
class NetworkConfig(OptimizerConfig):
    """The network and its data."""

    vocabulary: int = 32  # Tokens; units of the hidden layer
    width: int = 64
    own_share: float = 0.85  # Share of a site's examples that come from its own domain
    # Of the Dirichlet distribution that the tables are drawn from: the smaller, the more
    # predictable the next token.
    concentration: float = 0.05
    batch: int = 64  # Examples per step


class NetworkLearner(GradientLearner):
    """The network; see `GradientLearner`.

    Parameters
    ----------
    sites : int
        As many domains.
    config : NetworkConfig
    seed : int
        Of tables, initial weights and batches.
    """

    target = 1.45  # about uninterrupted FedAvg's after 35 rounds of 100 steps

    def __init__(self, sites: int, config: NetworkConfig, seed: int) -> None:
        super().__init__(sites, config, _initial(config, sites, np.random.default_rng([seed, 3])))
        self.config = config
        rng = np.random.default_rng([seed, 1])
        v, alpha = config.vocabulary, config.concentration
        self.tables = rng.dirichlet(np.full(v, alpha), size=(sites, v))  # [domain, token, next]
        rows = np.arange(sites * v)[:, None]
        self._cumulative = (np.cumsum(self.tables.reshape(-1, v), axis=-1) + rows).ravel()
        self._rngs = [np.random.default_rng([seed, 2, k]) for k in range(sites)]
        self._tokens = np.eye(v, dtype=np.float32)
        self._domains = np.eye(sites, dtype=np.float32)

    def floor(self) -> float:
        """Return the least possible held-out loss: the entropy of the tables, in nats."""
        p = np.maximum(self.tables, 1e-30)
        return float(-(p * np.log(p)).sum(-1).mean())

    def evaluate(self, weights: Mapping[str, Any]) -> float:
        """Return the exact held-out loss over all domains, in nats."""
        v = self.config.vocabulary
        domain = np.repeat(np.arange(self.sites), v)
        token = np.tile(np.arange(v), self.sites)
        _, logp = forward({k: np.asarray(a) for k, a in weights.items()}, domain, token)
        return float(-(self.tables.reshape(-1, v) * logp).sum(-1).mean())

    def batches(self, site: int, steps: int) -> Iterator[tuple[Any, ...]]:
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

    def backward(self, weights: Weights, gradients: Weights, *batch: Any) -> float:
        w, g = weights, gradients
        domain, token, label = batch
        (a, b), logp = forward(w, domain, token)
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


def _initial(c: NetworkConfig, domains: int, rng: np.random.Generator) -> Weights:
    def normal(*shape: int) -> Array:
        return np.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), dtype=np.float32)

    return {
        "token": normal(c.vocabulary, c.width),
        "domain": normal(domains, c.width),
        "hidden": normal(c.width, c.width),
        "out": normal(c.width, c.vocabulary),
        "bias": np.zeros(c.vocabulary, dtype=np.float32),
    }


def forward(w: Weights, domain: Any, token: Any) -> tuple[tuple[Array, Array], Array]:
    """Return the activations and the log-probabilities of the next token."""
    a = np.tanh(w["token"][token] + w["domain"][domain])
    b = np.tanh(a @ w["hidden"])
    logits = b @ w["out"] + w["bias"]
    logits -= logits.max(axis=1, keepdims=True)
    return (a, b), logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
