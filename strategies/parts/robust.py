"""Means that a few wrong updates cannot move far: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.parts.blocks import Tensor, block_size
from strategies.parts.rules import Record


def median(tensors: Sequence[Tensor]) -> Tensor:
    """Return the median of each number (arXiv 1803.01498)."""
    return np.asarray(np.median(np.stack(tensors), axis=0))


def trimmed_mean(tensors: Sequence[Tensor], cut: float) -> Tensor:
    """Return the mean of each number without the share `cut` at either end (arXiv 1803.01498)."""
    check_cut(cut)
    low = int(cut * len(tensors))
    high = len(tensors) - low
    ordered = np.partition(np.stack(tensors), (low, high - 1), axis=0)
    return np.asarray(ordered[low:high].mean(axis=0))


def check_cut(cut: float) -> None:
    """Refuse a share that would leave nothing."""
    if not 0 <= cut < 0.5:
        raise ValueError(f"cut={cut} must be at least 0 and below 0.5")


def krum(updates: Sequence[Record], malicious: int, selected: int) -> list[int]:
    """Return which updates lie closest to their neighbours (Krum, arXiv 1703.02757).

    An update's score is the sum of its squared distances to the n - f - 2 next to it, at least to
    one; those of the lowest scores are taken, in the order of the updates.

    Parameters
    ----------
    updates : sequence of mapping
    malicious : int
        f: how many may be wrong.
    selected : int
        1 is Krum, more are Multi-Krum.
    """
    distances = squared_distances(updates)
    count = max(1, len(updates) - malicious - 2)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(distances, axis=1)[:, :count]
    scores = nearest.sum(axis=1) if len(updates) > 1 else np.zeros(1)
    return sorted(int(i) for i in np.argsort(scores, kind="stable")[:selected])


def squared_distances(updates: Sequence[Record]) -> Tensor:
    """Return the squared distance of every update to every other, float64 (updates, updates)."""
    products = np.zeros((len(updates), len(updates)))
    for name in updates[0]:
        tensors = [update[name].numpy().reshape(-1) for update in updates]
        size = block_size(*[np.dtype(np.float64)] * len(tensors))
        for start in range(0, tensors[0].size, size):
            block = np.stack([t[start : start + size].astype(np.float64) for t in tensors])
            block -= block.mean(axis=0)  # near each other: else the digits would cancel out
            products += block @ block.T
    squares = np.diag(products)
    return np.asarray(np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0))
