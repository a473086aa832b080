"""Messages in flight over a Flower Grid: never blocks, never polls what must not be polled.

The traps of Flower 1.41 that this file keeps away from the engine: polling the reply of a node
that is offline destroys it; a SuperNode handles one message at a time; `push_messages` answers
an empty id for a refused message; a restarted SuperNode answers nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

from flwr.app import Message
from flwr.serverapp import Grid

from flwr_hpc.protocol import RELEASE
from strategies.engine.runtime import Clock, Settings
from strategies.engine.state import InFlight, Request

NODE_UNAVAILABLE = 5  # Flower's error code: nothing is known of the reply


class MessageTransport:
    """Pushes and pulls, at most one message in flight per node."""

    def __init__(self, grid: Grid, clock: Clock, settings: Settings) -> None:
        self.grid = grid
        self.clock = clock
        self.settings = settings
        self._flights: dict[str, InFlight] = {}

    def online(self) -> list[int]:
        """Return the nodes Flower lists, in a stable order."""
        return sorted(self.grid.get_node_ids())

    def busy(self) -> set[int]:
        """Return the nodes that have a message in flight."""
        return {flight.node_id for flight in self._flights.values()}

    def waiting_for(self, kind: str) -> int:
        """Return how many messages of a kind are in flight."""
        return sum(flight.kind == kind for flight in self._flights.values())

    def pull(self, online: Iterable[int]) -> list[tuple[InFlight, Message]]:
        """Return the replies that are there, of nodes that are online."""
        reachable = set(online)
        ids = [i for i, flight in self._flights.items() if flight.node_id in reachable]
        if not ids:
            return []
        replies = []
        for message in self.grid.pull_messages(ids):
            flight = self._flights.pop(message.metadata.reply_to_message_id, None)
            if flight is not None:  # else a duplicate
                replies.append((flight, message))
        rank = {message_id: n for n, message_id in enumerate(ids)}
        return sorted(replies, key=lambda pair: rank[pair[1].metadata.reply_to_message_id])

    def push(self, parcels: Sequence[tuple[Message, Request | None]]) -> list[bool]:
        """Push messages; tell for each whether the SuperLink took it."""
        if not parcels:
            return []
        now = self.clock.now()
        ids = list(self.grid.push_messages([message for message, _ in parcels]))
        if len(ids) != len(parcels):  # Flower answers nothing when the request was too large
            ids = [""] * len(parcels)
        for (message, request), message_id in zip(parcels, ids, strict=True):
            if message_id:
                meta = message.metadata
                flight = InFlight(meta.dst_node_id, meta.message_type, now, message, request)
                self._flights[message_id] = flight
        return [bool(message_id) for message_id in ids]

    def overdue(
        self, online: Iterable[int], launchers: set[int], lost: Callable[[str, InFlight], str]
    ) -> list[tuple[InFlight, str]]:
        """Forget and return the messages whose replies are taken for lost, and why.

        ``lost(message id, flight)`` says what is known of one before its time is up. A grid that
        fetches beside the loop knows of more: ``receiving(message id)``, where it has that.
        """
        limit = self.clock.now() - self.settings.wait_s - self.settings.reply_grace_s
        reachable = set(online) & launchers
        flying = self._unanswered(reachable)
        late = "the message or its answer was lost"
        reasons = {i: lost(i, f) or (late if f.sent_at < limit else "") for i, f in flying.items()}
        return [(self._flights.pop(i), reason) for i, reason in reasons.items() if reason]

    def lose(self, nodes: Set[int]) -> list[InFlight]:
        """Forget and return the messages to nodes that know nothing of them any more."""
        return [self._flights.pop(i) for i in self._unanswered(nodes)]

    def _unanswered(self, nodes: Set[int]) -> dict[str, InFlight]:
        """Return what is in flight to nodes and of whose reply nothing is here, by message id."""
        if not nodes:
            return {}
        receiving = getattr(self.grid, "receiving", lambda message_id: False)
        return {i: f for i, f in self._flights.items() if f.node_id in nodes and not receiving(i)}

    def drop(self, node_id: int) -> None:
        """Forget what is in flight to a node."""
        self._flights = {i: f for i, f in self._flights.items() if f.node_id != node_id}

    def drop_releases(self) -> None:
        """Stop waiting for answers to RELEASE."""
        self._flights = {i: f for i, f in self._flights.items() if f.kind != RELEASE}
