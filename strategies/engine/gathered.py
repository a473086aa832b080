"""Arrivals that no version has taken in yet, and what is told of the version that does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from strategies.engine import messages
from strategies.engine.state import SiteResult


class Gathered:
    """Entries of arrivals, as JSON, oldest first.

    Attributes
    ----------
    entries : list of dict
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, arrival: SiteResult) -> None:
        """Note an arrival."""
        entry = {
            "facility": arrival.facility,
            "order": arrival.order.id,
            "version": arrival.order.version,
            "metrics": messages.flat_metrics(arrival.message),
        }
        self.entries.append(entry)

    def take(self, pending: Iterable[str]) -> list[dict[str, Any]]:
        """Return and forget all but those whose orders are `pending`."""
        later = set(pending)
        taken = [e for e in self.entries if e["order"] not in later]
        self.entries = [e for e in self.entries if e["order"] in later]
        return taken


def shares(
    taken: list[dict[str, Any]], version: int, weight_of: Callable[[int], float]
) -> Mapping[str, Any]:
    """Return what is told of who is in a version, made from the weights of `version`.

    Parameters
    ----------
    taken : list of dict
        Entries of `Gathered`.
    version : int
    weight_of : callable
        The weight of a staleness.
    """
    staleness: dict[str, int] = {}
    weights: dict[str, float] = {}
    for entry in taken:
        name, age = entry["facility"], version - entry["version"]
        staleness[name] = max(staleness.get(name, 0), age)
        weights[name] = weights.get(name, 0.0) + weight_of(age) / len(taken)
    return {"facilities": sorted(weights), "staleness": staleness, "weights": weights}
