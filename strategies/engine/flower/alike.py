"""Replies made alike, as Flower's strategies demand: one reply that is not would end the run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from strategies.engine import messages

Form = frozenset[tuple[str, str]]  # (kind, key) of the records in a reply


def weight_key_of(layers: Iterable[Strategy]) -> str | None:
    """Return the metric by which a strategy of Flower's kind, or one it wraps, weighs replies."""
    keys = (getattr(strategy, "weighted_by_key", None) for strategy in layers)
    return next((key for key in keys if isinstance(key, str)), None)


def make_alike(
    replies: list[Message], weight_key: str | None, *, trained: bool = True
) -> list[Message]:
    """Return the replies with the records, and the metrics, that most of them have.

    Parameters
    ----------
    replies : list of Message
        One of a site that lacks a record becomes an error; a further record is dropped.
    weight_key : str or None
        The metric by which the strategy weighs replies. None: a strategy that makes no such
        demands; its replies keep all their records.
    trained : bool
        Whether they are to carry weights.
    """
    good = [r for r in replies if r.has_content()]
    if weight_key is not None and good:
        found = [_form(r.content, weight_key) if r.has_content() else None for r in replies]
        forms = Counter(form for form in found if form is not None)
        most = max(forms, key=lambda form: (forms[form], _usual(form, trained), -len(form)))
        replies = [
            r if form is None or form == most else _trimmed(r, form, most, weight_key)
            for r, form in zip(replies, found, strict=True)
        ]
        replies = _with_weight(replies, weight_key)
    _drop_odd_metrics([r for r in replies if r.has_content()])
    return replies


def _form(content: RecordDict, weight_key: str) -> Form:
    form: set[tuple[str, str]] = set()
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            form.add(("arrays", key))
        elif isinstance(record, MetricRecord):
            form.add(("metrics", key))
            if _counts(record, weight_key):
                form.add(("weight", key))
    return frozenset(form)


def _counts(record: MetricRecord, weight_key: str) -> bool:
    value = record.get(weight_key)
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _usual(form: Form, trained: bool) -> bool:
    """Whether a form is one that Flower's strategies take: it decides where two are as many."""
    kinds = Counter(kind for kind, _ in form)
    return kinds["metrics"] == kinds["weight"] == 1 and kinds["arrays"] == trained


def _trimmed(reply: Message, form: Form, wanted: Form, weight_key: str) -> Message:
    if lacking := wanted - form:
        kind, key = min(lacking)
        what = f"no {weight_key} in '{key}'" if kind == "weight" else f"no {kind} '{key}'"
        return _error(reply, f"{what}, as most replies have it")
    keys = {key for _, key in wanted}
    reply.content = RecordDict(
        {
            key: record
            for key, record in reply.content.items()
            if key in keys or not isinstance(record, ArrayRecord | MetricRecord)
        }
    )
    return reply


def _with_weight(replies: list[Message], weight_key: str) -> list[Message]:
    """Return errors if nothing that arrived counts: the mean would be divided by zero."""
    found = [m for r in replies if r.has_content() for m in _metrics(r).values()]
    weights: list[Any] = [m[weight_key] for m in found if weight_key in m]
    if not weights or sum(weights) > 0:
        return replies
    return [_error(r, f"{weight_key} is 0 in all") if r.has_content() else r for r in replies]


def _error(reply: Message, reason: str) -> Message:
    meta = reply.metadata
    sent = Message(RecordDict(), dst_node_id=meta.src_node_id, message_type=meta.message_type)
    return messages.error_reply(sent, reason)


def _drop_odd_metrics(good: list[Message]) -> None:
    """Drop the metrics that not every reply has, or has at another length."""
    found = [(reply, _metrics(reply)) for reply in good]
    single = [(reply, *metrics.popitem()) for reply, metrics in found if len(metrics) == 1]
    if not single:
        return
    common = set.intersection(*(_lengths(record) for _, _, record in single))
    names = {name for name, _ in common}
    for reply, key, record in single:
        if record.keys() != names:
            kept = MetricRecord({k: v for k, v in record.items() if k in names})
            reply.content = RecordDict({**reply.content, key: kept})


def _lengths(record: MetricRecord) -> set[tuple[str, int]]:
    return {(k, len(v) if isinstance(v, list) else -1) for k, v in record.items()}


def _metrics(reply: Message) -> dict[str, MetricRecord]:
    return messages.records(reply.content, MetricRecord)
