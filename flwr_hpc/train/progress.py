"""How far an order got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr_hpc.errors import UserError
from flwr_hpc.worker.deadline import Stop


class DivergedError(UserError):
    """Loss or gradient norm of a step is not finite; the step was not taken."""


Progress = Callable[[int, Callable[[], float]], None]


@dataclass
class OrderProgress:
    """How far an order got; survives in a checkpoint of that order."""

    steps: int = 0  # Done in this order, over all ranks; `tokens` are those the loss was taken on
    tokens: int = 0
    sequences: int = 0
    loss_sum: float = 0.0  # Summed loss of these tokens, in nats
    last_loss: float = 0.0  # Of the last step
    last_grad_norm: float = 0.0
    seconds: float = 0.0
    stopped: int = Stop.NO  # Why it ended early, if it did


@dataclass(frozen=True)
class Evaluated:
    """Held-out loss in nats per token, on how many tokens and sequences of all ranks."""

    loss: float
    tokens: int
    sequences: int
