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
        forms = Counter(_form(r.content, weight_key) for r in good)
        most = max(forms, key=lambda form: (forms[form], _usual(form, trained), -len(form)))
        replies = [_trimmed(r, most, weight_key) if r.has_content() else r for r in replies]
        replies = _with_weight(replies, weight_key)
    _drop_odd_metrics([r for r in replies if r.has_content()])
    return replies


def _form(content: RecordDict, weight_key: str) -> Form:
    arrays = {("arrays", key) for key in content.array_records}
    metrics = {("metrics", key) for key in content.metric_records}
    weights = {("weight", k) for k, r in content.metric_records.items() if _counts(r, weight_key)}
    return frozenset(arrays | metrics | weights)


def _counts(record: MetricRecord, weight_key: str) -> bool:
    value = record.get(weight_key)
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _usual(form: Form, trained: bool) -> bool:
    """Whether a form is one that Flower's strategies take: it decides where two are as many."""
    kinds = Counter(kind for kind, _ in form)
    return kinds["metrics"] == kinds["weight"] == 1 and kinds["arrays"] == trained


def _trimmed(reply: Message, form: Form, weight_key: str) -> Message:
    if lacking := form - _form(reply.content, weight_key):
        kind, key = min(lacking)
        what = f"no {weight_key} in '{key}'" if kind == "weight" else f"no {kind} '{key}'"
        return _error(reply, f"{what}, as most replies have it")
    keys = {key for _, key in form}
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
    records = [m for r in replies if r.has_content() for m in r.content.metric_records.values()]
    weights: list[Any] = [m[weight_key] for m in records if weight_key in m]
    if not weights or sum(weights) > 0:
        return replies
    return [_error(r, f"{weight_key} is 0 in all") if r.has_content() else r for r in replies]


def _error(reply: Message, reason: str) -> Message:
    meta = reply.metadata
    sent = Message(RecordDict(), dst_node_id=meta.src_node_id, message_type=meta.message_type)
    return messages.error_reply(sent, reason)


def _drop_odd_metrics(good: list[Message]) -> None:
    """Drop the metrics that not every reply has, or has at another length."""
    single = [r for r in good if len(r.content.metric_records) == 1]
    if not single:
        return
    common = set.intersection(*(_lengths(_metrics(r)[1]) for r in single))
    names = {name for name, _ in common}
    for reply in single:
        key, record = _metrics(reply)
        if set(record) != names:
            kept = MetricRecord({k: v for k, v in record.items() if k in names})
            reply.content = RecordDict({**reply.content, key: kept})


def _lengths(record: MetricRecord) -> set[tuple[str, int]]:
    return {(k, len(v) if isinstance(v, list) else -1) for k, v in record.items()}


def _metrics(reply: Message) -> tuple[str, MetricRecord]:
    return next(iter(reply.content.metric_records.items()))
