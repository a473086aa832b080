"""The sequences of an optimizer step, shared by a facility's ranks. Standard library only."""

from __future__ import annotations

import dataclasses
from typing import Any

from flwr_hpc.errors import UserError


def shared(train: Any, ranks: int, facility: str) -> Any:
    """Return the training settings with ``batch_size`` as micro batches of every rank.

    Parameters
    ----------
    train : flwr_hpc.config.schema.TrainConfig
        Not typed, because that module's checks call this one. ``micro_batch`` is the most a rank
        takes at a time.
    ranks : int
        Of which groups of ``tensor`` take the same sequences.
    facility : str
    """
    if train.batch_size is None:
        return train
    if train.accumulation != 1:
        raise UserError(
            f"train.batch_size={train.batch_size} and train.accumulation={train.accumulation} say "
            "the same thing twice; leave train.accumulation out"
        )
    copies = ranks // train.tensor
    each, rest = divmod(train.batch_size, copies)
    if rest or not each:
        nearest = max(1, round(train.batch_size / copies)) * copies
        groups = f" in groups of train.tensor={train.tensor}" if train.tensor > 1 else ""
        raise UserError(
            f"train.batch_size={train.batch_size} cannot be shared by the {ranks} ranks of "
            f"facility {facility}{groups}. Give a multiple, e.g. train.batch_size={nearest}"
        )
    micro = max(n for n in range(1, min(each, train.micro_batch) + 1) if each % n == 0)
    return dataclasses.replace(train, micro_batch=micro, accumulation=each // micro)
