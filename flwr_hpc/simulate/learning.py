"""What the simulated sites learn: a small network, really trained on data that differs by site.

The task is next-token prediction given the last token and a domain. Every domain has its own
table of transition probabilities; a site draws most of its examples from its own domain. The
held-out loss is exact: the cross-entropy of the network against the tables, averaged over
domains, so that it has no sampling noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Learner", "LearnerConfig"]

Array = NDArray[np.float32]
Weights = dict[str, Array]


@dataclass(frozen=True)
class LearnerConfig:
    """The network, its data and its optimizer.

    Attributes
    ----------
    vocabulary, width : int
        Tokens; units of the hidden layer.
    own_share : float
        Share of a site's examples that come from its own domain.
    concentration : float
        Of the Dirichlet distribution that the tables are drawn from: the smaller, the more
        predictable the next token.
    batch : int
        Examples per step.
    lr, betas, weight_decay, warmup_steps :
        AdamW with linear warm-up over the first steps of a site.
    """

    vocabulary: int = 32
    width: int = 64
    own_share: float = 0.85
    concentration: float = 0.05
    batch: int = 64
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup_steps: int = 20


@dataclass
class _Adam:
    step: int = 0
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)


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
        self._cumulative = np.cumsum(self.tables, axis=-1)
        self._rngs = [np.random.default_rng([seed, 2, k]) for k in range(sites)]
        self._adam = [_Adam() for _ in range(sites)]
        self._initial = _initial(config, sites, np.random.default_rng([seed, 3]))

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
    ) -> tuple[Weights, float]:
        """Train `steps` steps on a site's data; returns the weights and the mean loss.

        With `mu`, ``mu / 2 ||w - anchor||^2`` is added to the loss that is minimised
        (FedProx), not to the one that is returned.
        """
        w = {k: np.array(a, dtype=np.float32) for k, a in weights.items()}
        adam, total = self._adam[site], 0.0
        for domain, token, label in self._batches(site, steps):
            loss, gradients = _backward(w, domain, token, label)
            if mu and anchor is not None:
                for name, g in gradients.items():
                    g += np.float32(mu) * (w[name] - anchor[name])
            self._update(w, gradients, adam, lr_scale)
            total += loss
        return w, total / max(1, steps)

    def evaluate(self, weights: Mapping[str, Any]) -> float:
        """Return the exact held-out loss over all domains, in nats."""
        v = self.config.vocabulary
        domain = np.repeat(np.arange(self.sites), v)
        token = np.tile(np.arange(v), self.sites)
        _, logp = _forward({k: np.asarray(a) for k, a in weights.items()}, domain, token)
        return float(-(self.tables.reshape(-1, v) * logp).sum(-1).mean())

    def _batches(self, site: int, steps: int) -> Any:
        """Yield `steps` batches, drawn in one go."""
        c, rng = self.config, self._rngs[site]
        shape = (steps, c.batch)
        others = rng.integers(0, self.sites, size=shape)
        domain = np.where(rng.random(shape) < c.own_share, site, others)
        token = rng.integers(0, c.vocabulary, size=shape)
        u = rng.random(shape)
        for k in range(steps):
            table = self._cumulative[domain[k], token[k]]
            label = (table < u[k][:, None]).sum(axis=1)
            yield domain[k], token[k], np.minimum(label, c.vocabulary - 1)

    def _update(self, w: Weights, gradients: Weights, adam: _Adam, scale: float) -> None:
        c = self.config
        adam.step += 1
        lr = scale * c.lr * min(1.0, adam.step / max(1, c.warmup_steps))
        b1, b2 = c.betas
        rate = lr / (1 - b1**adam.step)
        root = (1 - b2**adam.step) ** 0.5
        for name, g in gradients.items():
            m = adam.first.setdefault(name, np.zeros_like(g))
            v = adam.second.setdefault(name, np.zeros_like(g))
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            w[name] -= lr * c.weight_decay * w[name] + rate * m / (np.sqrt(v) / root + 1e-8)


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


def _backward(w: Weights, domain: Any, token: Any, label: Any) -> tuple[float, Weights]:
    """Return the mean cross-entropy and its gradients."""
    (a, b), logp = _forward(w, domain, token)
    rows = np.arange(len(label))
    d = np.exp(logp)
    d[rows, label] -= 1.0
    d /= len(label)
    db = (d @ w["out"].T) * (1 - b * b)
    da = (db @ w["hidden"].T) * (1 - a * a)
    by_token, by_domain = np.zeros_like(w["token"]), np.zeros_like(w["domain"])
    np.add.at(by_token, token, da)
    np.add.at(by_domain, domain, da)
    return float(-logp[rows, label].mean()), {
        "token": by_token,
        "domain": by_domain,
        "hidden": a.T @ db,
        "out": b.T @ d,
        "bias": d.sum(axis=0),
    }
