"""Flower's FedAvg in blocks: the same sums, with no model whole in memory.

Flower's own has the mean of all tensors in memory, and then as many bytes again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from strategies.engine import messages
from strategies.parts.blocks import Tensor, blockwise

R = TypeVar("R", ArrayRecord, MetricRecord)
METRICS_MEAN = FedAvg().train_metrics_aggr_fn  # looks at metrics alone; a user's might not


def aggregate(
    strategy: Strategy, server_round: int, replies: list[Message]
) -> tuple[Mapping[str, Any] | None, MetricRecord | None]:
    """Return what ``strategy.aggregate_train`` does.

    Where that is FedAvg's own, Flower is given replies without tensors, and the mean of those
    comes here: number by number what Flower computes.
    """
    good = [reply for reply in replies if reply.has_content()]
    records = [record for r in good for record in _records(r, ArrayRecord)]
    metrics = [record for r in good for record in _records(r, MetricRecord)]
    whole = len(records) == len(metrics) == len(good)
    alike = all(_shapes(record) == _shapes(records[0]) for record in records)  # else Flower objects
    if not good or not whole or not alike or not _is_flowers_mean(strategy):
        return strategy.aggregate_train(server_round, replies)
    stripped = [_without_tensors(reply) if reply.has_content() else reply for reply in replies]
    _, mean = strategy.aggregate_train(server_round, stripped)
    counts: list[Any] = [m[cast(FedAvg, strategy).weighted_by_key] for m in metrics]
    factors = [count / sum(counts) for count in counts]

    def rule(*xs: Tensor) -> Tensor:
        total = xs[0] * factors[0]
        for x, factor in zip(xs[1:], factors[1:], strict=True):
            total += x * factor
        return np.asarray(total)

    return {n: blockwise(rule, *(record[n] for record in records)) for n in records[0]}, mean


def _is_flowers_mean(strategy: Strategy) -> bool:
    return (
        type(strategy).aggregate_train is FedAvg.aggregate_train
        and cast(FedAvg, strategy).train_metrics_aggr_fn is METRICS_MEAN
    )


def _shapes(record: ArrayRecord) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in record.items()}


def _records(reply: Message, kind: type[R]) -> Iterable[R]:
    return messages.records(reply.content, kind).values()


def _without_tensors(reply: Message) -> Message:
    stripped = copy.copy(reply)
    stripped.content = RecordDict(
        {k: ArrayRecord() if isinstance(r, ArrayRecord) else r for k, r in reply.content.items()}
    )
    return stripped
