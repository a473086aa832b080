"""Ranges of the strategies' arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flwr_hpc.protocol import WEIGHT_KEY

WEIGHTINGS = (WEIGHT_KEY, "uniform")  # How much a site counts


def positive(name: str, value: float | None) -> None:
    """Refuse what is not a finite number above zero; None is no number, and passes."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be greater than zero")


def not_negative(name: str, value: float | None) -> None:
    """Refuse what is not zero or a finite number above it; None passes."""
    if value is not None and not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be zero or greater")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}='{value}' is not known. Valid: {', '.join(choices)}")


def share(name: str, value: float) -> None:
    """Refuse what lies outside [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must be at least 0 and less than 1")


def positive_share(name: str, value: float) -> None:
    """Refuse what lies outside (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} must be greater than 0 and at most 1")


def steps(min_steps: int, max_steps: int) -> None:
    """Refuse bounds of an order that are not ``1 <= min_steps <= max_steps``."""
    if min_steps < 1:
        raise ValueError(f"min_steps={min_steps} must be at least 1")
    if max_steps < min_steps:
        raise ValueError(f"max_steps={max_steps} must be at least min_steps={min_steps}")
