"""Pseudo-gradients that wait to be merged, kept in the checkpoint store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import ArrayRecord

from strategies.engine.runtime import CheckpointStore
from strategies.engine.state import SiteResult
from strategies.parts import rules

DELTA = "delta-"  # and the order's id: its name in the store


@dataclass(frozen=True)
class Update:
    """One arrival's pseudo-gradient."""

    name: str  # Of the pseudo-gradient in the checkpoint store
    facility: str
    version: int  # The one the site started from; staleness is measured from there
    steps: int  # Really trained
    tokens: int
    examples: int

    @property
    def order_id(self) -> str:
        """The order that this came of."""
        return self.name.removeprefix(DELTA)


class Buffer:
    """Updates in the order of their arrival; its `state_dict` names the stored tensors."""

    def __init__(self) -> None:
        self._updates: list[Update] = []

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[Update]:
        return iter(self._updates)

    def add(self, store: CheckpointStore, arrival: SiteResult) -> Update:
        """Store an arrival's pseudo-gradient against the weights it STARTED from."""
        assert arrival.base is not None
        assert arrival.arrays is not None
        name = f"{DELTA}{arrival.order.id}"
        store.put(name, rules.record_delta(arrival.base, arrival.arrays))
        result = arrival.status.result if arrival.status else None
        update = Update(
            name=name,
            facility=arrival.facility,
            version=arrival.order.version,
            steps=arrival.steps,
            tokens=result.tokens if result else arrival.steps,
            examples=arrival.examples,
        )
        self._updates.append(update)
        return update

    def keep(self, updates: list[Update]) -> None:
        """Replace what is buffered."""
        self._updates = list(updates)

    def take(self) -> list[Update]:
        """Empty the buffer."""
        taken, self._updates = self._updates, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the updates as JSON."""
        return {
            "tensors": [u.name for u in self._updates],
            "updates": [asdict(u) for u in self._updates],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self._updates = [Update(**u) for u in state["updates"]]


def deltas(store: CheckpointStore, updates: Sequence[Update]) -> list[ArrayRecord]:
    """Return the pseudo-gradients themselves, maybe lazy."""
    return [store.get(u.name) for u in updates]
