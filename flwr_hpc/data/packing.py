"""Tokens into sequences of one length, with the part of each the loss is taken on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.unsignedinteger[Any]]
IGNORED = -100  # what torch's and transformers' cross entropy skip


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one length."""

    ids: Tokens
    # The loss is taken on the tokens ``start <= position < stop``. ``start`` is at least 1,
    # for nothing predicts the first token.
    spans: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens the loss is taken on."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def labels(ids: Tokens, spans: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the unshifted labels, `IGNORED` outside the spans; shape (n, seq_len)."""
    position = np.arange(ids.shape[1])
    inside = (position >= spans[:, :1]) & (position < spans[:, 1:])
    return np.where(inside, ids.astype(np.int64), IGNORED)


def pack(
    documents: Iterable[Tokens], seq_len: int, eos: int, pad: int, dtype: Any, overlap: bool
) -> Sequences:
    """Write documents one after the other, `eos` after each, and cut into sequences.

    Parameters
    ----------
    documents : iterable of ndarray
    seq_len, eos, pad : int
    dtype : numpy dtype
        Of the result's ids.
    overlap : bool
        False (training): sequences lie side by side and an incomplete last one is dropped.
        True (evaluation): each starts with the last token of the one before and the last is
        padded, so every token but the very first is predicted exactly once.
    """
    end = np.array([eos], dtype)
    parts = [part for document in documents for part in (document.astype(dtype), end)]
    stream = np.concatenate([*parts, np.empty(0, dtype)])
    if not overlap:
        count = len(stream) // seq_len
        ids = stream[: count * seq_len].reshape(count, seq_len)
        return Sequences(ids, np.tile(np.array([[1, seq_len]], np.int32), (count, 1)))
    stride = seq_len - 1
    count = max(0, -(-(len(stream) - 1) // stride))
    padded = np.concatenate([stream, np.full(count * stride + 1 - len(stream), pad, dtype)])
    starts = np.arange(count)[:, None] * stride
    spans = np.ones((count, 2), np.int32)
    spans[:, 1] = np.minimum(seq_len, len(stream) - starts[:, 0])
    return Sequences(padded[starts + np.arange(seq_len)], spans)


def pack_pairs(
    pairs: Sequence[tuple[Tokens, Tokens]], seq_len: int, eos: int, pad: int, dtype: Any
) -> Sequences:
    """Put each prompt and response into a sequence of its own, the loss on response and `eos`.

    Too long a pair is cut at its end; one whose prompt leaves no room for a response is
    dropped.
    """
    kept = [(p, r) for p, r in pairs if max(1, len(p)) < min(seq_len, len(p) + len(r) + 1)]
    ids = np.full((len(kept), seq_len), pad, dtype)
    spans = np.empty((len(kept), 2), np.int32)
    for row, (prompt, response) in enumerate(kept):
        tokens = np.concatenate([prompt, response, [eos]])[:seq_len]
        ids[row, : len(tokens)] = tokens
        spans[row] = max(1, len(prompt)), len(tokens)
    return Sequences(ids, spans)


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """Return one `Sequences` with the rows of all."""
    if len(parts) == 1:
        return parts[0]
    return Sequences(
        np.concatenate([part.ids for part in parts]), np.concatenate([p.spans for p in parts])
    )
