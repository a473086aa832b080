"""A strategy's and a result's state as JSON plus named tensors in the checkpoint store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from strategies.engine.runtime import CheckpointStore
from strategies.parts.rules import Tensor, Tensors, tensors

HISTORIES = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)


def save_strategy(strategy: Strategy, store: CheckpointStore, tag: str) -> dict[str, Any]:
    """Return a strategy's state as JSON; ``["tensors"]`` names what it put into the store.

    A strategy with ``state_dict`` says itself what matters. Of any other, the attributes that
    are numbers, arrays, lists or dicts of arrays, or ArrayRecords are taken: the moments of
    Flower's FedAdam, for example.
    """
    own = getattr(strategy, "state_dict", None)
    if callable(own):
        return {"tensors": [], **own()}
    state: dict[str, Any] = {"tensors": [], "numbers": {}, "arrays": {}}
    for attribute, value in vars(strategy).items():
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, bool | int | float):
            if math.isfinite(value):  # JSON knows no others; these are settings, not state
                state["numbers"][attribute] = value
            continue
        form = _form(value)
        if form:
            name = f"strategy-{attribute}-{tag}"
            store.put(name, _named(value))
            state["arrays"][attribute] = {"form": form, "name": name}
            state["tensors"].append(name)
    return state


def load_strategy(strategy: Strategy, store: CheckpointStore, state: Mapping[str, Any]) -> None:
    """Undo `save_strategy` on a newly made strategy."""
    own = getattr(strategy, "load_state_dict", None)
    if callable(own):
        own(dict(state))
        return
    for attribute, value in state["numbers"].items():
        setattr(strategy, attribute, value)
    for attribute, entry in state["arrays"].items():
        setattr(strategy, attribute, _shaped(store.get(entry["name"]), entry["form"]))


def _form(value: Any) -> str:
    """Return how an attribute holds arrays, or an empty string if it does not."""
    if isinstance(value, ArrayRecord):
        return "record"
    if isinstance(value, np.ndarray):
        return "array"
    if isinstance(value, list) and value and all(isinstance(v, np.ndarray) for v in value):
        return "list"
    if isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
        return "dict"
    return ""


def _named(value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, ArrayRecord):
        yield from tensors(value)
    elif isinstance(value, np.ndarray):
        yield "0", value
    else:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((str(key), array) for key, array in pairs)


def _shaped(record: ArrayRecord, form: str) -> Any:
    if form == "record":
        return record
    arrays = dict(_copies(tensors(record)))
    if form == "dict":
        return arrays
    in_order = [arrays[str(i)] for i in range(len(arrays))]
    return in_order[0] if form == "array" else in_order


def _copies(pairs: Tensors) -> Tensors:
    """A strategy may change its own state in place; a mapped file it may not."""
    for name, tensor in pairs:
        yield name, np.array(tensor)


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
