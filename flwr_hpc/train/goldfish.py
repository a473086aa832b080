"""Goldfish loss (arXiv 2406.10209): none on every k-th token, so that nothing is learnt by heart.

A token is left out by a hash of the tokens before it in its document: wherever a document comes
again, behind whatever others in its sequence, at whatever facility, on whatever device, the same
of its tokens are never learnt.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.data.batches import Batch
from flwr_hpc.train.loss import IGNORED

# All below stays under 2^62: exact in int64, with no overflow for devices to disagree on.
PRIME = 2**31 - 1
BASE = 1_103_515_245
MIXERS = (1_597_334_677, 747_796_405)


def training_batch(batch: Batch, config: TrainConfig) -> Batch:
    """Return the batch with the labels that ``train.loss`` learns from."""
    if config.loss != "goldfish":
        return batch
    dropped = left_out(batch.input_ids, config.goldfish_k, config.goldfish_h, batch.places)
    return replace(batch, labels=batch.labels.masked_fill(dropped, IGNORED))


def left_out(input_ids: Tensor, k: int, h: int, places: Tensor | None = None) -> Tensor:
    """Return which tokens get no loss: about one of `k`, by a hash of the `h` tokens before it.

    The first `h` tokens of a document, or of what of it lies in a sequence, have no whole hash and
    are kept.

    Parameters
    ----------
    input_ids : Tensor (sequences, seq_len), int64
    k, h : int
    places : Tensor (sequences, seq_len), int64, or None
        Of the tokens in their documents; None: a sequence is one document.

    Returns
    -------
    Tensor (sequences, seq_len), bool
    """
    dropped = torch.zeros_like(input_ids, dtype=torch.bool)
    count = input_ids.shape[1] - h  # tokens that have h before them
    if count <= 0:
        return dropped
    key = torch.zeros_like(input_ids[:, :count])
    for place in range(h):  # the order counts, and so does a token of id 0
        key = (key * BASE + input_ids[:, place : place + count] + 1) % PRIME
    for mixer in MIXERS:  # so that near keys fall far apart
        key = ((key ^ (key >> 15)) % PRIME) * mixer % PRIME
    dropped[:, h:] = key * k < PRIME
    return dropped if places is None else dropped & (places >= h)
