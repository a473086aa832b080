"""Building the messages of `flwr_hpc.protocol` and reading the replies."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from flwr_hpc import protocol
from flwr_hpc.protocol import Order, Status
from strategies.parts.rules import normalised

CONFIG = "config"  # Flower's own key of a train config

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)

log = logging.getLogger("strategies")


def query(
    kind: str,
    node_id: int,
    ttl: float,
    *,
    order: Order | None = None,
    wait: Mapping[str, float | bool] | None = None,
) -> Message:
    """Return a message without weights: DESCRIBE, ACQUIRE, COLLECT or RELEASE."""
    content = RecordDict()
    if order is not None:
        content[protocol.ORDER] = ConfigRecord({"json": protocol.to_json(order)})
    if wait is not None:
        content[protocol.WAIT] = ConfigRecord(dict(wait))
    return Message(content, node_id, kind, ttl=ttl)


def submit(
    order: Order,
    content: RecordDict,
    node_id: int,
    ttl: float,
    *,
    wait_s: float | None,
) -> Message:
    """Return the message that submits an order; `wait_s` None: to an ordinary ClientApp."""
    records: dict[str, Any] = dict(content)
    if wait_s is not None:
        records[protocol.ORDER] = ConfigRecord({"json": protocol.to_json(order)})
        records[protocol.WAIT] = ConfigRecord({"wait_s": float(wait_s)})
    kind = protocol.EVALUATE if order.kind == "evaluate" else protocol.TRAIN
    return Message(RecordDict(records), node_id, kind, ttl=ttl, group_id=str(order.version))


def plain_content(
    arrays: ArrayRecord | None,
    options: Mapping[str, Any],
    extra_arrays: Mapping[str, ArrayRecord] | None = None,
) -> RecordDict:
    """Return what an ordinary Flower message carries, arrays and config, and `extra_arrays`."""
    content = RecordDict({CONFIG: ConfigRecord(dict(options))})
    if arrays is not None:
        content[protocol.ARRAYS] = arrays
    for key, record in (extra_arrays or {}).items():
        content[key] = record
    return content


def part_of(record: ArrayRecord, names: Iterable[str] | None) -> ArrayRecord:
    """Return some arrays of a record, not loading any; all of them if `names` is None."""
    if names is None:
        return record
    part = ArrayRecord()  # its other constructors would read every array
    for name in names:
        part[name] = record[name]
    return part


def records(content: RecordDict, kind: type[R]) -> dict[str, R]:
    """Return the records of a kind; Flower's own properties write each one back as it is read."""
    return {key: record for key, record in content.items() if isinstance(record, kind)}


def options_of(content: RecordDict) -> dict[str, Any]:
    """Return the scalars of a message's config records, as an order's options."""
    return {
        key: value
        for record in records(content, ConfigRecord).values()
        for key, value in record.items()
        if isinstance(value, bool | int | float | str)
    }


def read_status(message: Message) -> Status | None:
    """Return the status in a reply, or None if it carries none that can be read."""
    record = message.content.get(protocol.STATUS) if message.has_content() else None
    if not isinstance(record, ConfigRecord) or "json" not in record:
        return None
    try:
        return protocol.read_status(str(record["json"]))
    except ValueError as exc:
        log.warning("a site's status cannot be read: %s", exc)
        return None


def asked_only(content: RecordDict, order: Order) -> RecordDict:
    """Return what an order asks for of a launcher's reply; it sends nothing else by itself."""
    asked = {ArrayRecord: order.asks_for, MetricRecord: (protocol.METRICS,)}
    kept = {k: r for k, r in content.items() if k in asked.get(type(r), (k,))}
    return content if len(kept) == len(content) else RecordDict(kept)


def arrays_of(message: Message) -> ArrayRecord | None:
    """Return the weights in a reply: under our key, or else the first arrays there are."""
    found = records(message.content, ArrayRecord)
    others = (record for key, record in found.items() if key != protocol.GRADIENT)
    return found.get(protocol.ARRAYS) or next(others, None)


def with_arrays(content: RecordDict, arrays: ArrayRecord) -> RecordDict:
    """Return a reply's content with other weights, under the key that its own have."""
    found = records(content, ArrayRecord)
    others = (key for key in found if key != protocol.GRADIENT)
    key = protocol.ARRAYS if protocol.ARRAYS in found else next(others)
    return RecordDict({**content, key: arrays})


def flat_metrics(message: Message) -> dict[str, float]:
    """Return the finite scalar metrics of a reply."""
    return {
        key: float(value)
        for record in records(message.content, MetricRecord).values()
        for key, value in record.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def mean_metrics(metrics: Sequence[Mapping[str, float]]) -> MetricRecord | None:
    """Average the metrics that all have, weighted by ``num-examples`` (1 where it is missing)."""
    if not metrics:
        return None
    weights = normalised([m.get(protocol.WEIGHT_KEY, 1.0) or 1e-12 for m in metrics])
    common = sorted(set.intersection(*(set(m) for m in metrics)) - {protocol.WEIGHT_KEY})
    return MetricRecord(
        {k: sum(w * m[k] for w, m in zip(weights, metrics, strict=True)) for k in common}
    )


def error_reply(sent: Message, reason: str) -> Message:
    """Return the error a strategy sees in place of a reply that did not come."""
    return Message(Error(0, reason), reply_to=sent)
