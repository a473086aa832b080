"""Stands in for Hugging Face's evaluate, which downloads its metrics: accuracy."""

from __future__ import annotations

from typing import Any


class Accuracy:
    """The share of predictions that are right."""

    def __init__(self) -> None:
        self._right, self._all = 0, 0

    def add_batch(self, predictions: Any, references: Any) -> None:
        self._right += int((predictions == references).sum())
        self._all += len(references)

    def compute(self) -> dict[str, float]:
        return {"accuracy": self._right / self._all}


def load(name: str) -> Accuracy:
    """Return the only metric there is here."""
    assert name == "accuracy"
    return Accuracy()
