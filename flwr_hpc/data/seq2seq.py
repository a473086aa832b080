"""Prompts and completions for encoder-decoders, which read the one and write the other.

A row of `Sequences` holds both, one behind the other, then padding; its span is the completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.data.packing import IGNORED, Answered, Sequences

MULTIPLE = 8  # Lengths that matrix products on GPUs are fast at

Ints = NDArray[np.int64]


class Sides(NamedTuple):
    """What an encoder-decoder is given, padded to the longest of the batch."""

    inputs: Ints  # (n, source)
    mask: Ints  # (n, source): 1 where a token is, 0 for padding
    # (n, 1 + target), unshifted: the first is what the decoder starts from, of which no loss is
    # taken.
    labels: Ints


def pack(
    answered: Sequence[Answered], seq_len: int, target_len: int, eos: int, pad: int, dtype: Any
) -> Sequences:
    """Put each prompt and completion into a row of its own.

    Each side is cut by itself, and keeps its end: as transformers' tokenizers do it.

    Parameters
    ----------
    answered : sequence of Answered
        Prompts with their end, and completions with theirs, which are what is learnt.
    seq_len, target_len : int
        Tokens of each at most.
    eos, pad : int
    dtype : numpy dtype
        Of the result's ids.
    """
    ids = np.full((len(answered), seq_len + target_len), pad, dtype)
    spans = np.empty((len(answered), 2), np.int32)
    cut = 0
    for row, (tokens, [(start, stop)]) in enumerate(answered):
        first, last = min(start, seq_len), min(start, seq_len) + min(stop - start, target_len)
        ids[row, :first], ids[row, first:last] = tokens[:first], tokens[start:][: last - first]
        ids[row, first - 1] = ids[row, last - 1] = eos
        spans[row] = first, last
        cut += last < stop
    return Sequences(ids, spans, lost=np.array([cut, 0]))


def sides(made: Sequences, rows: Ints, seq_len: int, pad: int) -> Sides:
    """Return what the encoder reads and the decoder is to write of some rows.

    Parameters
    ----------
    made : Sequences
        See `pack`.
    rows : ndarray (n,)
    seq_len : int
        Tokens of a prompt at most.
    pad : int
    """
    ids, (starts, stops) = made.ids[rows].astype(np.int64), made.spans[rows].T[..., None]
    source = np.arange(_length(starts, seq_len))
    target = np.arange(_length(stops - starts, ids.shape[1] - seq_len))
    mask = source < starts
    given = np.take_along_axis(ids, np.minimum(starts + target, stops - 1), 1)
    wanted = np.where(target < stops - starts, given, IGNORED)
    none = np.full((len(rows), 1), IGNORED)
    return Sides(
        np.where(mask, ids[:, : len(source)], pad),
        mask.astype(np.int64),
        np.concatenate([none, wanted], 1),
    )


def _length(lengths: NDArray[np.int32], most: int) -> int:
    return min(most, -(-int(lengths.max()) // MULTIPLE) * MULTIPLE)
