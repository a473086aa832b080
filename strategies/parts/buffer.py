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
        self._versions: dict[str, set[int]] | None = None  # by facility; None: count them anew

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[Update]:
        return iter(self._updates)

    def models_kept(self, sites: int) -> int:
        """Return one for each site's update."""
        return sites

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
        self._versions = None
        return update

    def holds(self, facility: str, version: int | None = None) -> bool:
        """Return whether an update of a facility is buffered, from this version or any."""
        if self._versions is None:
            self._versions = {}
            for update in self._updates:
                self._versions.setdefault(update.facility, set()).add(update.version)
        versions = self._versions.get(facility, set())
        return bool(versions) if version is None else version in versions

    def replace(self, updates: list[Update]) -> None:
        """Replace what is buffered."""
        self._updates, self._versions = list(updates), None

    def take(self) -> list[Update]:
        """Empty the buffer."""
        taken, self._updates, self._versions = self._updates, [], None
        return taken


def deltas(updates: Sequence[Update]) -> list[StoredTensors]:
    """Return the pseudo-gradients themselves, maybe lazy."""
    return [update.delta for update in updates]
