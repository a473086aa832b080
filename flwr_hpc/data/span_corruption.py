"""Span corruption (T5, arXiv 1910.10683): runs of tokens become sentinels, and are to be filled in.

Every sequence loses as many tokens in as many runs, so nothing has to be padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.data.packing import IGNORED
from flwr_hpc.errors import UserError

DENSITY, MEAN_RUN = 0.15, 3.0  # Share of the tokens that is left out; of tokens in a run

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SpanCorruption:
    """How sequences of `length` tokens become an encoder's inputs and a decoder's targets."""

    length: int  # Tokens of a sequence before it is corrupted
    sentinels: Ints  # One per run
    noise: int  # Tokens left out of each sequence
    eos: int

    @property
    def runs(self) -> int:
        """Runs that are left out of each sequence."""
        return len(self.sentinels)

    @property
    def target_length(self) -> int:
        """Tokens the decoder is to write: every run behind its sentinel, and the end."""
        return self.noise + self.runs + 1

    def batch(self, ids: NDArray[Any], stream: list[int], positions: Ints) -> tuple[Ints, Ints]:
        """Return inputs and unshifted labels; a place in the stream is always corrupted alike.

        Parameters
        ----------
        ids : ndarray (n, length)
        stream : list of int
            Which stream of sequences it is.
        positions : ndarray (n,)
            Places of the sequences in it.
        """
        pairs = [
            self._corrupt(row.astype(np.int64), [*stream, int(at)])
            for row, at in zip(ids, positions, strict=True)
        ]
        inputs = np.stack([given for given, _ in pairs])
        # The first is what the decoder starts from, of which no loss is taken.
        targets = np.stack([np.concatenate([[IGNORED], wanted]) for _, wanted in pairs])
        return inputs, targets

    def _corrupt(self, tokens: Ints, seed: list[int]) -> tuple[Ints, Ints]:
        draw = np.random.PCG64(seed)
        kept = _parts(draw, self.length - self.noise, self.runs)
        left_out = _parts(draw, self.noise, self.runs)
        ends = np.cumsum(np.stack([kept, left_out], 1).ravel())
        pieces = np.split(tokens, ends[:-1])  # kept, left out, kept, ...
        inputs: list[Any] = []
        targets: list[Any] = []
        for run, sentinel in enumerate(self.sentinels):
            inputs += [pieces[2 * run], [sentinel]]
            targets += [[sentinel], pieces[2 * run + 1]]
        return np.concatenate([*inputs, [self.eos]]), np.concatenate([*targets, [self.eos]])


def span_corruption(seq_len: int, tokenizer: Any) -> SpanCorruption:
    """Return the corruption whose inputs have `seq_len` tokens, sentinels and end included."""
    length = _text_length(seq_len)
    noise, runs = _shape(length)
    if not length or length <= noise or runs < 1:
        raise UserError(f"data.seq_len={seq_len} is too short for span corruption; 8 are needed")
    known = _sentinels(tokenizer, runs)
    if len(known) < runs:
        raise UserError(
            f"data.seq_len={seq_len} is corrupted in {runs} places, but the tokenizer has "
            f"{len(known)} sentinels (<extra_id_0> and so on). "
            + ("Lower data.seq_len" if known else "Name that of a T5 or mT5: data.tokenizer=PATH")
        )
    return SpanCorruption(length, np.array(known), noise, tokenizer.eos_token_id)


def target_length(seq_len: int) -> int:
    """Return how many tokens a decoder has to write whose encoder reads `seq_len`."""
    noise, runs = _shape(max(1, _text_length(seq_len)))
    return noise + runs + 1


def _text_length(seq_len: int) -> int:
    """Return how many tokens become inputs of `seq_len`; 0 if none do."""
    return next((n for n in range(2 * seq_len, 0, -1) if _input_length(n) <= seq_len), 0)


def _shape(length: int) -> tuple[int, int]:
    """Return how many tokens are left out of so many, and in how many runs."""
    noise = min(max(round(length * DENSITY), 1), length - 1)
    return noise, max(1, round(noise / MEAN_RUN))


def _input_length(length: int) -> int:
    noise, runs = _shape(length)
    return length - noise + runs + 1


def _sentinels(tokenizer: Any, most: int) -> list[int]:
    """Return the ids of the sentinels there are; those of mT5 are words of its vocabulary."""
    vocabulary = tokenizer.get_vocab()
    found = []
    for i in range(most):
        names = f"<extra_id_{i}>", f"▁<extra_id_{i}>"
        known = [vocabulary[name] for name in names if name in vocabulary]
        if not known:
            break
        found.append(known[0])
    return found


def _parts(draw: np.random.PCG64, total: int, count: int) -> Ints:
    """Cut `total` at random into `count` parts of at least one."""
    # Sorting raw bits: numpy promises their stream for all time.
    bits = draw.random_raw(total - 1)
    cuts = np.sort(np.argsort(bits, kind="stable")[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
