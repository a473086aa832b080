"""What the reply to a message may hold, by what was sent and asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message

from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.store import node_folder
from flwr_hpc.exchange.tensors import BadPayload, Layout
from flwr_hpc.protocol import ARRAYS, ORDER, TRAIN, Order, from_json


@dataclass(frozen=True)
class Expected:
    """Of one reply."""

    node: int  # That it comes from
    # Of the arrays that were asked for, by key; None: nothing is known of the model yet.
    layouts: Mapping[str, Layout | None] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where in the store its payloads lie."""
        return node_folder(self.node)


class Expectations:
    """Knows every node's layouts: a reply to COLLECT looks like weights that were sent long ago."""

    def __init__(self) -> None:
        self._sent: dict[tuple[int, str], Layout] = {}  # by node and key
        self._model: Layout | None = None

    def set_model(self, arrays: ArrayRecord) -> None:
        """Take the layout of replies from nodes that nothing was sent to yet."""
        self._model = RecordTensors(arrays).layout

    def note(self, message: Message) -> None:
        """Take the layouts of what a message sends, unless that is a part of the weights."""
        order = order_in(message)
        for key, record in message.content.array_records.items() if message.has_content() else ():
            if not (key == ARRAYS and order is not None and order.merges is not None):
                try:
                    self._sent[message.metadata.dst_node_id, key] = RecordTensors(record).layout
                except BadPayload:  # not weights as we know them
                    continue

    def reply_to(self, message: Message) -> Expected:
        """Return what the reply to a message may hold: without an order, what was sent."""
        node, order = message.metadata.dst_node_id, order_in(message)
        if order is not None:
            model = self._sent.get((node, ARRAYS), self._model)
            keys: dict[str, Layout | None] = dict.fromkeys(order.asks_for, model)
            if ARRAYS in keys:
                keys[ARRAYS] = _part(model, order)
            return Expected(node, keys)
        if message.metadata.message_type.partition(".")[0] != TRAIN:
            return Expected(node)
        sent = message.content.array_records if message.has_content() else {}
        layouts = {key: self._sent.get((node, key), self._model) for key in (ARRAYS, *sent)}
        return Expected(node, layouts)


def order_in(message: Message) -> Order | None:
    """Return the order that a message of ours submits or asks for."""
    record = message.content.get(ORDER) if message.has_content() else None
    return from_json(Order, str(record["json"])) if isinstance(record, ConfigRecord) else None


def _part(layout: Layout | None, order: Order) -> Layout | None:
    if layout is None or order.returns is None:
        return layout
    return {name: layout[name] for name in order.returns if name in layout}
