"""A Flower Grid whose nodes are simulated sites."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.identity import take_identity
from flwr_hpc.simulate.site import SimulatedSite


class _Node:
    """A SuperNode: one message at a time."""

    def __init__(self, node_id: int, site: SimulatedSite, joins: float, leaves: float) -> None:
        self.id, self.site, self.joins, self.leaves = node_id, site, joins, leaves
        self.inbox: deque[Callable[[], None]] = deque()
        self.busy = False

    def online(self, now: float) -> bool:
        return self.joins <= now < self.leaves and self.site.online()


class SimulatedGrid(Grid):
    """SuperLink and SuperNodes in virtual time.

    Parameters
    ----------
    clock : VirtualClock
    """

    def __init__(self, clock: VirtualClock) -> None:
        take_identity()
        self.clock = clock
        self._nodes: dict[int, _Node] = {}
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def join(self, site: SimulatedSite, at: float = 0.0, leaves: float = float("inf")) -> int:
        """Add a site; returns its node id."""
        node_id = len(self._nodes) + 1
        self._nodes[node_id] = _Node(node_id, site, at, leaves)
        return node_id

    # ---- Flower's Grid ----------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """Return None: there is one run."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not part of Flower's present API."""
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        """Return the nodes that are online."""
        now = self.clock.now()
        return [n.id for n in self._nodes.values() if n.online(now)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; an empty id for a node that is offline."""
        return [self._push(m) for m in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have come."""
        found = [self._replies.pop(i, None) for i in message_ids]
        return [m for m in found if m is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and wait for all replies."""
        ids = set(self.push_messages(messages)) - {""}
        until = None if timeout is None else self.clock.now() + timeout
        replies: list[Message] = []
        while ids and (until is None or self.clock.now() < until):
            found: Sequence[Message] = self.pull_messages(sorted(ids))
            ids -= {m.metadata.reply_to_message_id for m in found}
            replies += found
            self.clock.sleep(1.0)
        return replies

    # ---- the network ------------------------------------------------------------------------

    def _push(self, message: Message) -> str:
        node = self._nodes[message.metadata.dst_node_id]
        if not node.online(self.clock.now()):
            return ""
        message_id = f"m{next(self._ids)}"
        message.metadata.__dict__["_message_id"] = message_id
        f = node.site.facility
        carries = len(message.content.array_records) > 0
        delay = f.latency_s + (node.site.transfer_s(message.content) if carries else 0.0)
        self.clock.at(self.clock.now() + delay, lambda: self._deliver(node, message, message_id))
        return message_id

    def _deliver(self, node: _Node, message: Message, message_id: str) -> None:
        node.inbox.append(lambda: self._handle(node, message, message_id))
        self._next(node)

    def _next(self, node: _Node) -> None:
        if node.inbox and not node.busy:
            node.busy = True
            node.inbox.popleft()()

    def _handle(self, node: _Node, message: Message, message_id: str) -> None:
        def answer(content: RecordDict | Error) -> None:
            self._replies[message_id] = Message(content, reply_to=message)
            node.busy = False
            self._next(node)

        if begins_s := node.site.facility.message_s:
            then = self.clock.now() + begins_s
            self.clock.at(then, lambda: node.site.handle(message, answer))
        else:
            node.site.handle(message, answer)
