"""What a strategy names survives a restart, in the form it had; what cannot is refused in words."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
from worlds.strategies.driven import record
from worlds.strategies.grid import VirtualClock

from strategies import HpcStrategy, Runtime
from strategies.base.fields import StoredTensors
from strategies.base.persistence import load_strategy, save_strategy
from strategies.engine.runtime import MemoryCheckpoints


@dataclass
class Appointment:
    persistent_times: ClassVar = ("at",)

    at: float
    who: list[str] = field(default_factory=list)


class Average:
    persistent = ("mean",)

    def __init__(self, share: float = 0.5) -> None:
        self.share = share  # a setting, which a restart makes anew
        self.mean: StoredTensors | None = None


class Base(HpcStrategy):
    persistent = ("value",)

    def __init__(self, value: object = None) -> None:
        super().__init__()
        self.value = value


class Whole(Base):
    persistent = ("later",)
    persistent_times = ("due",)

    def __init__(self) -> None:
        super().__init__()
        self.later: list[Appointment] = []
        self.due: float | None = None
        self.averages = [Average(0.1), Average(0.2)]
        self.average = Average(0.3)


def resumed(old, new, at: float = 0.0):
    """Return the new strategy with the old one's state, read from JSON, on another clock."""
    store = old.runtime.checkpoints
    state = json.loads(json.dumps(save_strategy(old, store, ""), allow_nan=False))
    store.commit(state)
    new.runtime = Runtime(clock=VirtualClock(), checkpoints=store)
    new.runtime.clock.t = at
    load_strategy(new, store, state)
    return new


def on_a_clock(strategy, t: float = 0.0):
    strategy.runtime = Runtime(clock=VirtualClock())
    strategy.runtime.clock.t = t
    return strategy


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        True,
        "text",
        0.1 + 0.2,
        math.inf,
        [1, [2, None]],
        (1, "a", (2,)),
        {"a"},
        {"a": 1.5, "b": math.inf},
        {1: "by number", (2, 3): "by pair"},
        {"~": "a key of ours"},
        {"a": (1, 2)},
        Appointment(3.0, ["a"]),
    ],
    ids=repr,
)
def test_a_value_comes_back_as_it_was(value):
    """Protects from JSON's own forms: lists for tuples, texts for keys, no infinity."""
    found = resumed(on_a_clock(Base(value)), Base()).value
    assert found == value
    assert type(found) is type(value)


def test_arrays_in_memory_come_back_writable():
    """A user may keep plain arrays; in place changes go on after a restart."""
    arrays = {"w": np.ones((2, 2), np.float32), "b": np.arange(3)}
    found = resumed(on_a_clock(Base(arrays)), Base()).value
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        found[name] += 1


def test_parts_are_saved_with_their_owner():
    """Protects momentum and buffers: no strategy has to name them; settings are made anew."""
    old = on_a_clock(Whole())
    pairs = [("w", np.ones(2, np.float32))]
    old.averages[1].mean = old.keep_tensors("mean", pairs)
    old.average.mean = old.keep_tensors("mean", pairs)
    new = Whole()
    new.averages[1].share = 0.9
    resumed(old, new)
    assert new.averages[0].mean is None
    np.testing.assert_array_equal(new.averages[1].mean["w"].numpy(), 1.0)
    np.testing.assert_array_equal(new.average.mean["w"].numpy(), 1.0)
    assert [a.share for a in new.averages] == [0.1, 0.9]


def test_times_are_what_is_left_of_them():
    """Another process has another clock: of a time on it, the distance is kept."""
    old = on_a_clock(Whole(), 100.0)
    old.due, old.later = 130.0, [Appointment(110.0, ["a"])]
    new = resumed(old, Whole(), at=1000.0)
    assert new.due == 1030.0
    assert new.later == [Appointment(1010.0, ["a"])]


def test_what_the_last_checkpoint_needs_is_never_overwritten():
    """A server that dies between a step and its commit finds the tensors of the last commit."""
    old = on_a_clock(Base())
    old.value = old.keep_tensors("momentum", [("w", np.zeros(2))])
    store = old.runtime.checkpoints
    new = resumed(old, Base())
    new.value = new.keep_tensors("momentum", [("w", np.ones(2))])  # and dies
    again = Base()
    again.runtime = Runtime(checkpoints=store)
    load_strategy(again, store, save_strategy(old, store, ""))
    np.testing.assert_array_equal(again.value["w"].numpy(), 0.0)


def test_only_what_is_named_is_needed():
    """The store does not grow: a field that is replaced frees its tensors."""
    old = on_a_clock(Base())
    for k in range(3):
        old.value = {"newest": old.keep_tensors("m", [("w", np.full(2, k))]), "k": k}
    new = resumed(old, Base())
    np.testing.assert_array_equal(new.value["newest"]["w"].numpy(), 2)
    assert new.value["k"] == 2
    assert len(save_strategy(new, new.runtime.checkpoints, "")["tensors"]) == 1


def test_an_array_record_in_a_field():
    """What Flower hands over may be kept as it is."""
    kept = record({"w": np.ones(2)})
    found = resumed(on_a_clock(Base(kept)), Base()).value
    np.testing.assert_array_equal(found["w"].numpy(), 1.0)


class Misspelt(HpcStrategy):
    persistent = ("momentun",)

    def __init__(self) -> None:
        super().__init__()
        self.momentum = 0.0


def test_a_field_that_is_not_there_is_named():
    """Protects from a state that is silently lost: it fails at the first commit, before any job."""
    with pytest.raises(AttributeError, match=r"names 'momentun'.*Did you mean 'momentum'"):
        save_strategy(on_a_clock(Misspelt()), MemoryCheckpoints(), "")


def test_what_cannot_be_saved_is_refused():
    """Protects from a traceback of the JSON library hours into a run."""
    with pytest.raises(TypeError, match=r"Base\.value is persistent but holds a function.*Valid"):
        save_strategy(on_a_clock(Base(on_a_clock)), MemoryCheckpoints(), "")


def test_a_checkpoint_of_another_version_is_refused():
    """Protects from going on with half a state after the class was changed."""
    old = on_a_clock(Base(1))
    with pytest.raises(ValueError, match=r"no Whole\.later: it is of another version"):
        resumed(old, Whole())
