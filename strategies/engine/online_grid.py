"""The Grid that a strategy's hooks see: the sites the engine knows, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from strategies.engine.engine import Engine

PATIENCE = 4  # Flower's sample_nodes asks twice; who asks more often waits for somebody


class OnlineSitesGrid(Grid):
    """Lists one node per facility that is online, or was within the grace.

    Flower's strategies sample from it; the engine does the sending.
    """

    def __init__(self, grid: Grid, engine: Engine) -> None:
        self._grid = grid
        self._engine = engine
        self._asked = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return node ids, ordered by facility."""
        self._asked += 1
        if self._asked > PATIENCE:
            self._engine.discover()
        return [site.node_id for site in self._engine.reachable()]

    def fresh(self) -> OnlineSitesGrid:
        """Return this roster for another call of a hook."""
        self._asked = 0
        return self

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Pass on."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass on."""
        return self._grid.send_and_receive(messages, timeout=timeout)
