"""What of a strategy survives a restart: the fields that it names, and its tensors in the store.

A strategy, and every part it is made of, names its fields::

    persistent = ("count", "momentum")
    persistent_times = ("closes_at",)

A subclass names its own alone; parts (an outer optimizer, a buffer) need not be named.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

from strategies.engine.runtime import CheckpointStore
from strategies.parts.blocks import Lazy, Tensor, Tensors
from strategies.parts.rules import tensors

KIND = "~"  # key, in the JSON, of what JSON has no form for
PLAIN = {bool, int, float, str, type(None)}
FORMS = ("record", "array", "list", "dict of arrays")
VALID = (
    "numbers, texts, None, lists, tuples, sets and dicts of such; tensors of `keep_tensors`, "
    "numpy arrays and ArrayRecords; dataclasses of a module, and objects with `persistent`"
)


class StoredTensors(Mapping[str, Array]):
    """Tensors in the checkpoint store under a name, read one at a time."""

    def __init__(self, name: str, arrays: ArrayRecord) -> None:
        self.name, self.arrays = name, arrays

    def __getitem__(self, key: str) -> Array:
        """Return a tensor, which may be loaded only by its `numpy`."""
        return self.arrays[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tensors."""
        return iter(self.arrays)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self.arrays)

    __eq__ = object.__eq__  # a Mapping's would load both
    __hash__ = object.__hash__


# ``keep(label, pairs)``: `strategies.HpcStrategy.keep_tensors`
Keep = Callable[[str, Iterable[tuple[str, Lazy]]], StoredTensors]


def names_of(cls: type, attribute: str = "persistent") -> tuple[str, ...]:
    """Return what a class and its bases name, the bases' first."""
    found: dict[str, None] = {}
    for base in reversed(cls.__mro__):
        named = vars(base).get(attribute, ())
        found.update(dict.fromkeys([named] if isinstance(named, str) else named))
    return tuple(found)


def save_fields(owner: Any, keep: Keep, now: float) -> tuple[dict[str, Any], list[str]]:
    """Return the named fields of an object as JSON, and the names of the tensors they need.

    Parameters
    ----------
    owner : object
    keep : callable
        Takes arrays in memory.
    now : float
        Times are saved as what is left of them.
    """
    writer = _Writer(keep, now)
    return writer.fields(owner), writer.tensors


def load_fields(owner: Any, state: Mapping[str, Any], store: CheckpointStore, now: float) -> None:
    """Undo `save_fields` on a newly made object."""
    _Reader(store, now).fill(owner, state)


class _Writer:
    def __init__(self, keep: Keep, now: float) -> None:
        self.keep, self.now = keep, now
        self.tensors: list[str] = []

    def fields(self, owner: Any) -> dict[str, Any]:
        times = names_of(type(owner), "persistent_times")
        for name in [*names_of(type(owner)), *times]:
            if not hasattr(owner, name):
                raise _no_such(owner, name)
        named = {name: getattr(owner, name) for name in _all_names(owner)}
        shifted = {k: _shifted(v, -self.now) if k in times else v for k, v in named.items()}
        return {k: self.value(v, k, owner) for k, v in shifted.items()}

    def value(self, value: Any, label: str, owner: Any) -> Any:
        """Return a value as JSON; what JSON has no form for is tagged."""
        if isinstance(value, np.generic):
            value = value.item()
        if type(value) in PLAIN:
            return _number(value) if type(value) is float else value
        if isinstance(value, StoredTensors):
            self.tensors.append(value.name)
            return {KIND: "tensors", "name": value.name}
        if form := form_of(value):
            stored = self.keep(f"array-{label.strip('_')}", pairs_of(value))
            self.tensors.append(stored.name)
            return {KIND: form, "name": stored.name}
        if isinstance(value, dict):
            return self._dict(value, label, owner)
        if isinstance(value, list | tuple | set):
            items = [self.value(v, label, owner) for v in _in_order(value)]
            return items if isinstance(value, list) else {KIND: type(value).__name__, "of": items}
        if _is_part(value) or dataclasses.is_dataclass(value):
            return {KIND: _path_of(type(value)), "fields": self.fields(value)}
        raise TypeError(
            f"{type(owner).__name__}.{label} is persistent but holds a {type(value).__name__}, "
            f"which cannot be saved. Valid: {VALID}."
        )

    def _dict(self, value: dict[Any, Any], label: str, owner: Any) -> Any:
        inner = value.values()
        if set(map(type, inner)) <= {float, int} and all(map(math.isfinite, inner)):
            made = dict(value)  # fast: a table of thousands of sites
        else:
            made = {k: self.value(v, label, owner) for k, v in value.items()}
        if set(map(type, value)) <= {str} and KIND not in value:
            return made
        pairs = [[self.value(k, label, owner), v] for k, v in made.items()]
        return {KIND: "dict", "of": pairs}


class _Reader:
    def __init__(self, store: CheckpointStore, now: float) -> None:
        self.store, self.now = store, now

    def fill(self, owner: Any, state: Mapping[str, Any]) -> None:
        """Set the fields of an object, in the objects it has where it has them."""
        times = names_of(type(owner), "persistent_times")
        for name in [*names_of(type(owner)), *times]:
            if name not in state:
                raise ValueError(
                    f"the checkpoint has no {type(owner).__name__}.{name}: it is of another "
                    "version of this strategy. Start a new run, or name what was named then."
                )
        for name, saved in state.items():
            value = self.value(saved, getattr(owner, name, None))
            setattr(owner, name, _shifted(value, self.now) if name in times else value)

    def value(self, saved: Any, old: Any) -> Any:
        """Return what was saved; `old` is what the new object has in its place."""
        if isinstance(saved, list):
            olds = dict(enumerate(old)) if isinstance(old, list) else {}
            return [self.value(v, olds.get(k)) for k, v in enumerate(saved)]
        if not isinstance(saved, dict):
            return saved
        if KIND not in saved:
            olds = old if isinstance(old, dict) else {}
            return {k: self.value(v, olds.get(k)) for k, v in saved.items()}
        return self._tagged(saved[KIND], saved, old)

    def _tagged(self, kind: str, saved: Mapping[str, Any], old: Any) -> Any:
        if kind == "float":
            return float(saved["of"])
        if kind == "tensors":
            return StoredTensors(saved["name"], self.store.get(saved["name"]))
        if kind in FORMS:
            return shaped(self.store.get(saved["name"]), kind)
        if kind in ("tuple", "set", "dict"):
            items = self.value(saved["of"], None)
            return {"tuple": tuple, "set": set, "dict": dict}[kind](items)
        return self._object(pkgutil.resolve_name(kind), saved["fields"], old)

    def _object(self, cls: type, fields: Mapping[str, Any], old: Any) -> Any:
        if _is_part(cls):
            made = old if type(old) is cls else cls()
            self.fill(made, fields)
            return made
        times = names_of(cls, "persistent_times")
        values = {k: self.value(v, None) for k, v in fields.items()}
        return cls(**{k: _shifted(v, self.now) if k in times else v for k, v in values.items()})


def _all_names(owner: Any) -> list[str]:
    """Return the fields that an object names, and those of its parts."""
    cls = type(owner)
    if dataclasses.is_dataclass(cls) and not _is_part(cls):
        return [field.name for field in dataclasses.fields(cls)]
    parts = [name for name, value in vars(owner).items() if _has_parts(value)]
    return list(dict.fromkeys([*names_of(cls), *names_of(cls, "persistent_times"), *parts]))


def _is_part(value: Any) -> bool:
    return hasattr(value, "persistent") and not isinstance(value, Strategy)


def _has_parts(value: Any) -> bool:
    several: Any = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        several = value.values()
    return len(several) > 0 and all(map(_is_part, several))


def _path_of(cls: type) -> str:
    """Return the name by which a class is found again."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    if "<locals>" in path or cls.__module__ == "__main__":
        raise TypeError(f"{path} cannot be found again after a restart: move it to a module")
    return path


def _no_such(owner: Any, name: str) -> AttributeError:
    near = difflib.get_close_matches(name, list(vars(owner)), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return AttributeError(
        f"{type(owner).__name__} names '{name}' as persistent but has no such attribute: set it "
        f"in __init__.{hint}"
    )


def _number(value: float) -> Any:
    return value if math.isfinite(value) else {KIND: "float", "of": str(value)}


def _shifted(times: Any, by: float) -> Any:
    """Return times, of which there may be a list or dict, on another clock."""
    if isinstance(times, dict):
        return {key: _shifted(time, by) for key, time in times.items()}
    if isinstance(times, list):
        return [_shifted(time, by) for time in times]
    return None if times is None else times + by


def _in_order(values: Any) -> Any:
    return sorted(values, key=repr) if isinstance(values, set) else values


# ---- arrays in memory ------------------------------------------------------------------------


def form_of(value: Any) -> str:
    """Return how an attribute holds arrays, or an empty string if it does not."""
    if isinstance(value, ArrayRecord):
        return "record"
    if isinstance(value, np.ndarray):
        return "array"
    if isinstance(value, list) and value and all(isinstance(v, np.ndarray) for v in value):
        return "list"
    if isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
        return "dict of arrays"
    return ""


def pairs_of(value: Any) -> Tensors:
    """Yield the arrays of an attribute by name."""
    if isinstance(value, ArrayRecord):
        yield from tensors(value)
    elif isinstance(value, np.ndarray):
        yield "0", value
    else:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((str(key), array) for key, array in pairs)


def shaped(record: ArrayRecord, form: str) -> Any:
    """Undo `pairs_of` into the form that the attribute had."""
    if form == "record":
        return record
    arrays = dict(_copies(tensors(record)))
    if form == "dict of arrays":
        return arrays
    in_order = [arrays[str(i)] for i in range(len(arrays))]
    return in_order[0] if form == "array" else in_order


def _copies(pairs: Tensors) -> Iterator[tuple[str, Tensor]]:
    """A strategy may change its own state in place; a mapped file it may not."""
    for name, tensor in pairs:
        yield name, np.array(tensor)
