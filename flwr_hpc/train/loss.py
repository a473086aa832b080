"""The next-token loss, summed, so that any split of the batch adds up to the same number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100


def count_tokens(labels: Tensor) -> int:
    """Return on how many tokens of `labels` (sequences, seq_len) the loss is taken.

    The first token of a sequence has nothing before it and never counts.
    """
    return int((labels[:, 1:] != IGNORED).sum())


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross entropy of every next token, in nats.

    Parameters
    ----------
    logits : Tensor (sequences, seq_len, vocabulary)
        Any floating-point type; the loss is taken in float32.
    labels : Tensor (sequences, seq_len), int64
        Not shifted: ``labels[i] = input_ids[i]``, or -100 where no loss is taken.

    Returns
    -------
    Tensor (), float32
    """
    return cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).to(torch.float32),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
