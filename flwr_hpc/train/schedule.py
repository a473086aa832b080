"""The learning rate as a pure function of a facility's cumulative step."""

from __future__ import annotations

import math

from flwr_hpc.config.schema import TrainConfig


def schedule_steps(train: TrainConfig, rounds: int) -> int:
    """Return at which cumulative step the schedule ends: it spans the run, not one round."""
    return train.schedule_steps or rounds * train.steps


def learning_rate(step: int, train: TrainConfig, total: int) -> float:
    """Return the learning rate of cumulative step `step` (from 0).

    Linear warm-up to ``lr`` over ``warmup_steps``, then cosine (arXiv 1608.03983, without
    restarts) down to ``lr * min_lr_ratio`` at step `total`, constant from there.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, total - train.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.lr * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * cosine)
