"""A message's random numbers are those of a fresh process, though the app's process is warm.

Flower gives each message a process of its own: what a seed at import determines comes again with
every message. So what the import of the app's own modules seeded is put back before each message,
also where a function imports them. What no seed determines goes on: it is new in every process.
"""

from __future__ import annotations

import importlib.abc
import random
import sys
from collections.abc import Callable, Collection
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

BLOCKS = 2000  # of 624 draws, that a module may make unseeded while it is imported
CHOSEN_BITS = 32  # a seed that somebody chose is shorter than one of the operating system's

Restore = Callable[[], Any]


class ImportSeeds(importlib.abc.MetaPathFinder):
    """Watches the app's modules being imported, and puts back what they seeded.

    Parameters
    ----------
    folder : str
        The app's; empty: its modules are those of `package`.
    package : str
    """

    def __init__(self, folder: str, package: str) -> None:
        self._folder, self._package = folder, package
        self._restores: dict[str, Restore] = {}

    def watch(self) -> None:
        """Look at every import from now on."""
        sys.meta_path.insert(0, self)

    def restore(self) -> None:
        """Put back the states that imports have left."""
        for restore in self._restores.values():
            restore()

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let a module of the app's be found as ever, and look before and after it runs."""
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not self._is_of_the_app(name, spec.origin):
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            before = _Globals()
            run(module)
            self._restores |= before.seeded_since(self._restores) | _seeded_in(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _is_of_the_app(self, name: str, origin: str | None) -> bool:
        if not self._folder:
            return name.partition(".")[0] == self._package
        return origin is not None and Path(origin).is_relative_to(self._folder)


class _Globals:
    """The global generators of Python, numpy and torch at a moment."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()
        self._torch_seed, self._torch_state = _torch_now()

    def seeded_since(self, known: Collection[str]) -> dict[str, Restore]:
        """Return how to restore those that were seeded since; of `known` ones also drawn from."""
        found: dict[str, Restore] = {}
        python = random.getstate()
        if python != self._python and (
            "random" in known or not _is_drawn(self._python[1][:-1], python[1][:-1])
        ):
            found["random"] = partial(random.setstate, python)
        words: Any = np.random.get_state()
        if not _same(self._numpy, words) and (
            "numpy" in known or not _is_drawn(self._numpy[1], words[1])
        ):
            found["numpy"] = partial(np.random.set_state, words)
        seed, state = _torch_now()
        chosen = seed.bit_length() <= CHOSEN_BITS and ("torch" in known or seed != self._torch_seed)
        if state != self._torch_state and chosen:
            found["torch"] = _restore_torch()
        return found


def _same(one: Any, other: Any) -> bool:
    return np.array_equal(one[1], other[1]) and tuple(one[2:]) == tuple(other[2:])


def _is_drawn(before: Any, after: Any) -> bool:
    """Tell whether a state of MT19937 follows from another by drawing, or is the same."""
    bits, wanted = np.random.MT19937(), np.array(after, dtype=np.uint32)
    key = np.array(before, dtype=np.uint32)
    for _ in range(BLOCKS):
        if np.array_equal(key, wanted):
            return True
        bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
        bits.random_raw(output=False)  # makes the next 624 words
        key = bits.state["state"]["key"]
    return False


def _torch() -> Any:
    return sys.modules.get("torch")


def _torch_now() -> tuple[int, bytes]:
    """Return seed and state of torch's generator, ``(-1, b"")`` before it is imported."""
    torch = _torch()
    if not hasattr(torch, "get_rng_state"):
        return -1, b""
    return torch.initial_seed(), torch.get_rng_state().numpy().tobytes()


def _restore_torch() -> Restore:
    torch = _torch()
    seed, state = torch.initial_seed(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        torch.manual_seed(seed)  # of the devices, too
        torch.set_rng_state(state)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)

    return restore


def _seeded_in(module: ModuleType) -> dict[str, Restore]:
    """Return how to restore the generators that a module holds in its variables."""
    found: dict[str, Restore] = {}
    for name, value in vars(module).items():
        key = f"{module.__name__}.{name}"
        if isinstance(value, np.random.Generator):
            entropy = getattr(value.bit_generator.seed_seq, "entropy", None)
            if isinstance(entropy, int) and entropy.bit_length() > CHOSEN_BITS:
                continue
            found[key] = partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            found[key] = partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            found[key] = partial(value.setstate, value.getstate())
        elif (torch := _torch()) and isinstance(value, torch.Generator):
            found[key] = partial(value.set_state, value.get_state())
    return found
