"""A strategy's and a result's state as JSON plus named tensors in the checkpoint store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from strategies.base.fields import (
    StoredTensors,
    form_of,
    load_fields,
    pairs_of,
    save_fields,
    shaped,
)
from strategies.engine.runtime import CheckpointStore, Runtime
from strategies.parts.blocks import Lazy

HISTORIES = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)


@runtime_checkable
class NamesFields(Protocol):
    """A strategy of ours: see `strategies.base.fields`."""

    runtime: Runtime
    kept: int  # How often `keep_tensors` was called: no name is used twice

    def keep_tensors(self, label: str, tensors: Iterable[tuple[str, Lazy]]) -> StoredTensors:
        """Put tensors into the checkpoint store."""


def save_strategy(strategy: Strategy, store: CheckpointStore, tag: str) -> dict[str, Any]:
    """Return a strategy's state as JSON; ``["tensors"]`` names what it put into the store.

    One of ours names its fields. Of any other, the attributes that are numbers, arrays, lists or
    dicts of arrays, or ArrayRecords are taken: the moments of Flower's FedAdam, for example. A
    strategy that wraps another one as its ``strategy`` (differential privacy) is saved with it.
    """
    state = _save_own(strategy, store, tag)
    wrapped = getattr(strategy, "strategy", None)
    if isinstance(wrapped, Strategy):
        state["wrapped"] = save_strategy(wrapped, store, f"{tag}-wrapped")
        state["tensors"] = [*state["tensors"], *state["wrapped"]["tensors"]]
    return state


def _save_own(strategy: Strategy, store: CheckpointStore, tag: str) -> dict[str, Any]:
    if isinstance(strategy, NamesFields):
        now = strategy.runtime.clock.now()
        fields, names = save_fields(strategy, strategy.keep_tensors, now)
        return {"tensors": names, "fields": fields, "kept": strategy.kept}
    state: dict[str, Any] = {"tensors": [], "numbers": {}, "arrays": {}}
    for attribute, value in vars(strategy).items():
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, bool | int | float):
            if math.isfinite(value):  # JSON knows no others; these are settings, not state
                state["numbers"][attribute] = value
            continue
        form = form_of(value)
        if form:
            name = f"strategy-{attribute}-{tag}"
            store.put(name, pairs_of(value))
            state["arrays"][attribute] = {"form": form, "name": name}
            state["tensors"].append(name)
    return state


def load_strategy(strategy: Strategy, store: CheckpointStore, state: Mapping[str, Any]) -> None:
    """Undo `save_strategy` on a newly made strategy."""
    wrapped = getattr(strategy, "strategy", None)
    if isinstance(wrapped, Strategy):
        load_strategy(wrapped, store, state["wrapped"])
    if isinstance(strategy, NamesFields):
        strategy.kept = state["kept"]
        load_fields(strategy, state["fields"], store, strategy.runtime.clock.now())
        return
    for attribute, value in state["numbers"].items():
        setattr(strategy, attribute, value)
    for attribute, entry in state["arrays"].items():
        setattr(strategy, attribute, shaped(store.get(entry["name"]), entry["form"]))


def result_state(result: Result, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the finite metrics of a result as JSON.

    What is in `known`, the state some versions ago, is not looked at again.
    """
    state: dict[str, Any] = {}
    for key in HISTORIES:
        before = (known or {}).get(key, {})
        records = ((str(r), record) for r, record in getattr(result, key).items())
        state[key] = {r: before[r] if r in before else _finite(record) for r, record in records}
    return state


def _finite(record: MetricRecord) -> dict[str, Any]:
    return {k: v for k, v in record.items() if np.isfinite(v).all()}


def forget_metrics(result: Result, version: int) -> None:
    """Drop what a result says of a version: the event log keeps it."""
    for key in HISTORIES:
        getattr(result, key).pop(version, None)


def load_result(state: Mapping[str, Any]) -> Result:
    """Undo `result_state`."""
    result = Result()
    for key in HISTORIES:
        history = getattr(result, key)
        history.update({int(r): MetricRecord(m) for r, m in state.get(key, {}).items()})
    return result
