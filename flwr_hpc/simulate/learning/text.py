"""A small transformer on text whose domains are spread over the sites.

Next-character prediction on the names of Unicode's characters (`unicode_names`). A site draws most
of its passages from its own domain; nothing tells the model which domain a passage is of. The
held-out loss is that of a fixed set of passages from names that nobody trains on, the same
number from each domain. The gradients are written out here: on one core, with so little to
compute, numpy needs half of torch's time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flwr_hpc.simulate.learning import unicode_names
from flwr_hpc.simulate.learning.base import Array, GradientLearner, OptimizerConfig, Weights

DRAWN_AT_ONCE = 64  # batches
EPSILON = 1e-6


@dataclass(frozen=True)
class TextConfig(OptimizerConfig):
    """The transformer and its data."""

    lr: float = 3e-3
    width: int = 32  # of the residual stream; of the feed-forward layer: twice that
    heads: int = 2
    blocks: int = 1
    context: int = 16  # characters of a passage
    batch: int = 16  # passages per step
    own_share: float = 0.85  # Share of a site's passages that come from its own domain
    held_out: int = 256  # passages, of all domains together


@dataclass
class _Block:
    """What a block's backward pass needs of its forward pass."""

    normed: Array
    scale: Array
    q: Array
    k: Array
    v: Array
    attention: Array
    mixed: Array
    normed2: Array
    scale2: Array
    active: Array


class Transformer:
    """A decoder: RMS norm before attention and feed-forward, learned positions, no weight tied.

    Parameters
    ----------
    config : TextConfig
    """

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        t = config.context
        self._hidden = np.triu(np.full((t, t), -1e9, dtype=np.float32), 1)
        self._one_hot = np.eye(len(unicode_names.ALPHABET), dtype=np.float32)

    def initial(self, rng: np.random.Generator) -> Weights:
        """Return random weights."""
        c, d, v = self.config, self.config.width, len(unicode_names.ALPHABET)
        shapes = {"token": (v, d), "position": (c.context, d)}
        for i in range(c.blocks):
            shapes |= {f"{i}.qkv": (d, 3 * d), f"{i}.mix": (d, d)}
            shapes |= {f"{i}.up": (d, 2 * d), f"{i}.down": (2 * d, d)}
        shapes |= {"head": (d, v)}
        made = {
            name: np.asarray(rng.normal(size=shape) / np.sqrt(d), dtype=np.float32)
            for name, shape in shapes.items()
        }
        return made | {"bias": np.zeros(v, dtype=np.float32)}

    def loss(self, w: Weights, passages: Array) -> float:
        """Return the mean cross-entropy of predicting each passage's next characters."""
        *_, logp = self._forward(w, passages[:, :-1])
        labels = passages[:, 1:].ravel()
        return float(-logp[np.arange(len(labels)), labels].mean())

    def backward(self, w: Weights, g: Weights, passages: Array) -> float:
        """Return the loss; its gradients are written into `g`."""
        inputs, labels = passages[:, :-1], passages[:, 1:].ravel()
        blocks, last, scale, logp = self._forward(w, inputs)
        rows = np.arange(len(labels))
        loss = float(-logp[rows, labels].mean())
        d = np.exp(logp)
        d[rows, labels] -= 1.0
        d /= len(labels)
        np.matmul(last.T, d, out=g["head"])
        np.sum(d, axis=0, out=g["bias"])
        dx = _norm_backward(d @ w["head"].T, last, scale)
        for i in reversed(range(self.config.blocks)):
            dx = self._block_backward(w, g, i, blocks[i], dx)
        np.matmul(self._one_hot[inputs.ravel()].T, dx, out=g["token"])
        np.sum(dx.reshape(*inputs.shape, -1), axis=0, out=g["position"])
        return loss

    def _forward(self, w: Weights, inputs: Array) -> tuple[list[_Block], Array, Array, Array]:
        """Return the blocks' activations, the last norm's, and the log-probabilities by row."""
        x = (w["token"][inputs] + w["position"]).reshape(-1, self.config.width)
        blocks = []
        for i in range(self.config.blocks):
            x, block = self._block(w, i, x)
            blocks.append(block)
        last, scale = _norm(x)
        logits = last @ w["head"] + w["bias"]
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return blocks, last, scale, logits

    def _block(self, w: Weights, i: int, x: Array) -> tuple[Array, _Block]:
        normed, scale = _norm(x)
        q, k, v = self._split(normed @ w[f"{i}.qkv"])
        scores = q @ k.swapaxes(-1, -2)
        scores *= q.shape[-1] ** -0.5
        scores += self._hidden
        scores -= scores.max(axis=-1, keepdims=True)
        attention = np.exp(scores, out=scores)
        attention /= attention.sum(axis=-1, keepdims=True)
        mixed = self._join(attention @ v)
        x = x + mixed @ w[f"{i}.mix"]
        normed2, scale2 = _norm(x)
        active = np.maximum(normed2 @ w[f"{i}.up"], 0)
        block = _Block(normed, scale, q, k, v, attention, mixed, normed2, scale2, active)
        return x + active @ w[f"{i}.down"], block

    def _block_backward(self, w: Weights, g: Weights, i: int, b: _Block, dx: Array) -> Array:
        np.matmul(b.active.T, dx, out=g[f"{i}.down"])
        up = (dx @ w[f"{i}.down"].T) * (b.active > 0)
        np.matmul(b.normed2.T, up, out=g[f"{i}.up"])
        dx = dx + _norm_backward(up @ w[f"{i}.up"].T, b.normed2, b.scale2)
        np.matmul(b.mixed.T, dx, out=g[f"{i}.mix"])
        (mixed,) = self._split(dx @ w[f"{i}.mix"].T, parts=1)
        scores = mixed @ b.v.swapaxes(-1, -2)
        scores -= (scores * b.attention).sum(axis=-1, keepdims=True)
        scores *= b.attention
        scores *= b.q.shape[-1] ** -0.5
        parts = scores @ b.k, scores.swapaxes(-1, -2) @ b.q, b.attention.swapaxes(-1, -2) @ mixed
        qkv = np.concatenate([self._join(part) for part in parts], axis=1)
        np.matmul(b.normed.T, qkv, out=g[f"{i}.qkv"])
        return dx + _norm_backward(qkv @ w[f"{i}.qkv"].T, b.normed, b.scale)

    def _split(self, x: Array, parts: int = 3) -> Any:
        """Return `parts` arrays [passage, head, position, channel] of rows that hold them all."""
        c = self.config
        shape = (-1, c.context, parts, c.heads, c.width // c.heads)
        return x.reshape(shape).transpose(2, 0, 3, 1, 4)

    def _join(self, x: Array) -> Array:
        """Return the rows of an array [passage, head, position, channel]."""
        return x.swapaxes(1, 2).reshape(-1, self.config.width)


def _norm(x: Array) -> tuple[Array, Array]:
    """Return the rows divided by their root mean square, and what they were multiplied by."""
    scale = 1.0 / np.sqrt((x * x).mean(axis=1, keepdims=True) + x.dtype.type(EPSILON))
    return x * scale, scale


def _norm_backward(d: Array, normed: Array, scale: Array) -> Array:
    return np.asarray(scale * (d - normed * (d * normed).mean(axis=1, keepdims=True)))


class TextLearner(GradientLearner):
    """The transformer at every site; see `GradientLearner`.

    Parameters
    ----------
    sites : int
        As many domains.
    config : TextConfig
    seed : int
        Of initial weights, passages, and the order of the names.
    """

    target = 1.7  # about uninterrupted FedAvg's after 12 rounds of 100 steps

    def __init__(self, sites: int, config: TextConfig, seed: int) -> None:
        self.config, self.model = config, Transformer(config)
        super().__init__(sites, config, self.model.initial(np.random.default_rng([seed, 3])))
        rng = np.random.default_rng([seed, 1])
        shares = [unicode_names.split(share) for share in unicode_names.domains(sites)]
        texts = [_encoded(train, rng) for train, _ in shares]
        self._text = np.concatenate(texts)
        self._lengths = np.array([len(text) for text in texts])
        self._begins = np.cumsum(self._lengths) - self._lengths
        self._rngs = [np.random.default_rng([seed, 2, k]) for k in range(sites)]
        each = max(1, config.held_out // sites)
        self._held_out = np.concatenate(
            [_passages(_encoded(names, rng), each, config.context + 1) for _, names in shares]
        )

    def evaluate(self, weights: Mapping[str, Any]) -> float:
        return self.model.loss({k: np.asarray(a) for k, a in weights.items()}, self._held_out)

    def batches(self, site: int, steps: int) -> Iterator[tuple[Any, ...]]:
        for begun in range(0, steps, DRAWN_AT_ONCE):
            for passages in self._draw(site, min(DRAWN_AT_ONCE, steps - begun)):
                yield (passages,)

    def backward(self, weights: Weights, gradients: Weights, *batch: Any) -> float:
        return self.model.backward(weights, gradients, *batch)

    def _draw(self, site: int, steps: int) -> Array:
        """Return passages [step, passage, position], each with the character after it."""
        c, rng = self.config, self._rngs[site]
        shape = (steps, c.batch)
        others = rng.integers(0, self.sites, size=shape)
        domain = np.where(rng.random(shape) < c.own_share, site, others)
        room = self._lengths[domain] - c.context
        begin = self._begins[domain] + (rng.random(shape) * room).astype(np.int64)
        return np.asarray(self._text[begin[..., None] + np.arange(c.context + 1)])


def _encoded(names: list[str], rng: np.random.Generator) -> Array:
    """Return the names in random order, a line each, as indices into the alphabet."""
    text = "".join(f"{names[k]}\n" for k in rng.permutation(len(names)))
    codes = np.zeros(128, dtype=np.int64)
    codes[[ord(letter) for letter in unicode_names.ALPHABET]] = range(len(unicode_names.ALPHABET))
    return np.asarray(codes[np.frombuffer(text.encode("ascii"), dtype=np.uint8)])


def _passages(text: Array, count: int, length: int) -> Array:
    """Return passages at equal distances."""
    begins = np.linspace(0, len(text) - length, count).astype(np.int64)
    return np.asarray(text[begins[:, None] + np.arange(length)])
