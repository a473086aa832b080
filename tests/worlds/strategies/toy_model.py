"""A model of two tensors, and training on it that can be followed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from flwr_hpc import protocol

NAMES = ("layer.weight", "layer.bias")


def initial_arrays(dtype: str = "float32") -> ArrayRecord:
    """Weights of a model with two tensors."""
    rng = np.random.default_rng(0)
    return ArrayRecord(
        {
            NAMES[0]: array(rng.normal(size=(3, 4)).astype(dtype)),
            NAMES[1]: array(rng.normal(size=(5,)).astype(dtype)),
        }
    )


def array(x: np.ndarray) -> Any:
    return next(iter(ArrayRecord([x]).values()))


def as_numpy(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in arrays.items()}


def pull_towards(target: float, rate: float = 0.1) -> Callable[[dict, int], dict]:
    """Training on a quadratic: every step moves the weights a little towards `target`."""

    def train(weights: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
        keep = (1.0 - rate) ** max(1, steps)
        return {
            k: (w * w.dtype.type(keep) + w.dtype.type((1.0 - keep) * target))
            for k, w in weights.items()
        }

    return train


def with_nan(content: RecordDict) -> None:
    """Spoil a result: its weights are no numbers."""
    arrays = content[protocol.ARRAYS]
    content[protocol.ARRAYS] = ArrayRecord(
        {k: array(a.numpy() * np.float32("nan")) for k, a in arrays.items()}
    )
