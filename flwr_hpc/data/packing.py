"""Tokens into sequences of one length, with the part of each the loss is taken on."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.unsignedinteger[Any]]
# Tokens, and the ranges of them that are learnt, in order: of what somebody else said and answered.
Answered = tuple[Tokens, list[tuple[int, int]]]
Block = tuple[list[Tokens], list[Answered]]
IGNORED = -100  # What torch's and transformers' cross entropy skip


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one length."""

    ids: Tokens
    # The loss is taken on the tokens ``start <= position < stop``. ``start`` is at least 1,
    # for nothing predicts the first token.
    spans: NDArray[np.int32]
    # Places in ``ids.ravel()`` where a document starts behind another, in order.
    starts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # Ranges of places in ``ids.ravel()``, in order, within spans, on which no loss is taken: what
    # others say between the assistant's turns.
    silent: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    # Records that were cut, and those that were left out because nothing to learn would be left.
    lost: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens the loss is taken on."""
        spans = int((self.spans[:, 1] - self.spans[:, 0]).sum())
        return spans - int((self.silent[:, 1] - self.silent[:, 0]).sum())


PackRecords = Callable[[Sequence[Answered]], Sequences]


class Marks(NamedTuple):
    """What `Sequences` hold beside the ids."""

    spans: NDArray[np.int32]
    starts: NDArray[np.int64]
    silent: NDArray[np.int64]
    lost: NDArray[np.int64]


def labels(ids: Tokens, spans: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the unshifted labels, `IGNORED` outside the spans; shape (n, seq_len)."""
    position = np.arange(ids.shape[1])
    inside = (position >= spans[:, :1]) & (position < spans[:, 1:])
    return np.where(inside, ids.astype(np.int64), IGNORED)


def first_tokens(made: Sequences, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which tokens of some rows are a document's first, behind another; (n, seq_len)."""
    seq_len = made.ids.shape[1]
    first = np.zeros((len(rows), seq_len), np.bool_)
    for place, row in enumerate(rows):
        within = slice(*np.searchsorted(made.starts, [row * seq_len, (row + 1) * seq_len]))
        first[place, made.starts[within] - row * seq_len] = True
    return first


def silent_tokens(made: Sequences, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which tokens of some rows lie in silent ranges; (n, seq_len)."""
    seq_len = made.ids.shape[1]
    silent = np.zeros((len(rows), seq_len), np.bool_)
    for place, row in enumerate(rows):
        within = slice(*np.searchsorted(made.silent[:, 0], [row * seq_len, (row + 1) * seq_len]))
        for start, stop in made.silent[within] - row * seq_len:
            silent[place, start:stop] = True
    return silent


def positions(first: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return each token's place in its document, as far as that lies in its row."""
    place = np.arange(first.shape[1])
    return place - np.maximum.accumulate(np.where(first, place, 0), axis=1)


def stream(
    path: Path,
    blocks: Iterable[Block],
    seq_len: int,
    eos: int,
    dtype: Any,
    pack_records: PackRecords,
) -> Marks:
    """Write training sequences to a file, block by block; return what goes with their ids.

    Documents lie one after the other, `eos` after each, and are cut side by side; an incomplete
    last sequence is dropped. Then comes what was answered, as `pack_records` makes rows of it.
    """
    end = np.array([eos], dtype).tobytes()
    row = seq_len * np.dtype(dtype).itemsize
    spans: list[NDArray[np.int32]] = []
    silent: list[NDArray[np.int64]] = [np.empty((0, 2), np.int64)]
    rows, lost = 0, np.zeros(2, np.int64)
    lengths: list[NDArray[np.int64]] = []
    with path.open("wb") as ids, tempfile.TemporaryFile(dir=path.parent) as behind:
        for documents, answered in blocks:
            for document in documents:
                ids.write(document.astype(dtype).tobytes() + end)
            lengths.append(_lengths(documents))
            made = pack_records(answered)
            behind.write(made.ids.tobytes())
            spans.append(made.spans)
            silent.append(made.silent + rows * seq_len)
            rows += len(made)
            lost += made.lost
        count = ids.tell() // row
        ids.truncate(count * row)
        ids.seek(count * row)
        behind.seek(0)
        shutil.copyfileobj(behind, ids)
        ids.flush()
        os.fsync(ids.fileno())
    starts = _starts(lengths)
    starts = starts[(starts < count * seq_len) & (starts % seq_len > 0)]
    full = np.tile(np.array([[1, seq_len]], np.int32), (count, 1))
    behind_full = np.concatenate(silent) + count * seq_len
    return Marks(np.concatenate([full, *spans]), starts, behind_full, lost)


def _lengths(documents: Sequence[Tokens]) -> NDArray[np.int64]:
    return np.array([len(document) + 1 for document in documents], np.int64)


def _starts(lengths: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return where each document but the first starts, all written one after the other."""
    return np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths]))[:-1]


def pack(documents: Sequence[Tokens], seq_len: int, eos: int, pad: int, dtype: Any) -> Sequences:
    """Write documents one after the other, `eos` after each, and cut for evaluation.

    Each sequence starts with the last token of the one before and the last is padded, so every
    token but the very first is predicted exactly once.

    Parameters
    ----------
    documents : sequence of ndarray
    seq_len, eos, pad : int
    dtype : numpy dtype
        Of the result's ids.
    """
    end = np.array([eos], dtype)
    parts = [part for document in documents for part in (document.astype(dtype), end)]
    tokens = np.concatenate([*parts, np.empty(0, dtype)])
    stride = seq_len - 1
    count = max(0, -(-(len(tokens) - 1) // stride))
    padded = np.concatenate([tokens, np.full(count * stride + 1 - len(tokens), pad, dtype)])
    starts = np.arange(count)[:, None] * stride
    spans = np.ones((count, 2), np.int32)
    spans[:, 1] = np.minimum(seq_len, len(tokens) - starts[:, 0])
    row, place = np.divmod(_starts([_lengths(documents)]) - 1, stride)
    return Sequences(padded[starts + np.arange(seq_len)], spans, row * seq_len + place + 1)


def pack_answered(answered: Sequence[Answered], seq_len: int, pad: int, dtype: Any) -> Sequences:
    """Put each prompt and completion, or conversation, into a sequence of its own.

    The loss is on what was answered. Too long a one is cut at its end; where the cut leaves no
    answer it is dropped.
    """
    kept = [(t, s) for t, s in answered if s and max(1, s[0][0]) < min(seq_len, s[0][1])]
    ids = np.full((len(kept), seq_len), pad, dtype)
    spans = np.empty((len(kept), 2), np.int32)
    silent: list[tuple[int, int]] = []
    for row, (tokens, learnt) in enumerate(kept):
        ids[row, : len(tokens)] = tokens[:seq_len]
        within = [(start, min(stop, seq_len)) for start, stop in learnt if start < seq_len]
        spans[row] = max(1, within[0][0]), within[-1][1]
        between = itertools.pairwise(within)
        silent += [(a + row * seq_len, b + row * seq_len) for (_, a), (b, _) in between]
    lost = np.array([sum(len(t) > seq_len for t, _ in kept), len(answered) - len(kept)])
    return Sequences(ids, spans, silent=np.array(silent, np.int64).reshape(-1, 2), lost=lost)


def whole(made: Sequences) -> Sequences:
    """Return the sequences that are not padded, whatever documents they are made of."""
    full = made.spans[:, 1] == made.ids.shape[1]
    return Sequences(made.ids[full], made.spans[full])


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """Return one `Sequences` with the rows of all."""
    before = np.cumsum([0, *(part.ids.size for part in parts)])
    return Sequences(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.spans for part in parts]),
        np.concatenate([part.starts + n for part, n in zip(parts, before[:-1], strict=True)]),
        np.concatenate([part.silent + n for part, n in zip(parts, before[:-1], strict=True)]),
        np.sum([part.lost for part in parts], axis=0),
    )
