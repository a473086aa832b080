"""Pseudo-gradients that wait to be merged, kept in the checkpoint store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from strategies.base.fields import Keep, StoredTensors
from strategies.engine.state import SiteResult
from strategies.parts import rules


@dataclass(frozen=True)
class Update:
    """One result's pseudo-gradient."""

    delta: StoredTensors
    facility: str
    order_id: str
    version: int  # The one the site started from; staleness is measured from there
    steps: int  # Really trained
    tokens: int
    examples: int


class Buffer:
    """Updates in the order of their arrival."""

    persistent = ("_updates",)

    def __init__(self) -> None:
        self._updates: list[Update] = []

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[Update]:
        return iter(self._updates)

    def add(self, keep: Keep, result: SiteResult) -> Update:
        """Store a result's pseudo-gradient against the weights it STARTED from."""
        assert result.base is not None
        assert result.arrays is not None
        trained = result.status.result if result.status else None
        update = Update(
            delta=keep("delta", rules.record_delta(result.base, result.arrays)),
            facility=result.facility,
            order_id=result.order.id,
            version=result.order.version,
            steps=result.steps,
            tokens=trained.tokens if trained else result.steps,
            examples=result.examples,
        )
        self._updates.append(update)
        return update

    def replace(self, updates: list[Update]) -> None:
        """Replace what is buffered."""
        self._updates = list(updates)

    def take(self) -> list[Update]:
        """Empty the buffer."""
        taken, self._updates = self._updates, []
        return taken


def deltas(updates: Sequence[Update]) -> list[StoredTensors]:
    """Return the pseudo-gradients themselves, maybe lazy."""
    return [update.delta for update in updates]
