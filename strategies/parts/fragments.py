"""Fragments of a model: the parts of it that are synchronized one at a time, and their steps."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

from strategies.base.fields import Keep
from strategies.engine.messages import part_of
from strategies.parts.blocks import Lazy, Tensors, as_is
from strategies.parts.outer import OuterSGD

LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # the first number in a name counts the layers


def fragments(arrays: Mapping[str, Array], count: int) -> list[list[str]]:
    """Return the names of every fragment's tensors; the same for the same model.

    Layers stay whole and are dealt out in turn, so that a fragment has layers of every depth
    (the strided pattern of arXiv 2501.18512); what belongs to no layer goes ahead of them, and
    everything to the fragment with the fewest bytes so far. So two fragments differ by no more
    than the largest layer or tensor outside the layers.

    Parameters
    ----------
    arrays : mapping of str to Array
        The model; nothing of it is loaded.
    count : int
        How many fragments; at most as many as there are tensors. With fewer layers than
        fragments, tensors are dealt out one by one.
    """
    count = min(count, len(arrays))
    size = {name: max(1, _bytes(array)) for name, array in arrays.items()}
    found: list[list[str]] = [[] for _ in range(count)]
    load = [0] * count
    for unit in _units(size, count):
        lightest = load.index(min(load))
        found[lightest] += unit
        load[lightest] += sum(size[name] for name in unit)
    return [sorted(names) for names in found]


def _units(size: Mapping[str, int], count: int) -> list[list[str]]:
    """Return what is dealt out together, in order: single tensors, then layers."""
    layers: dict[int, list[str]] = defaultdict(list)
    for name in sorted(size):
        if match := LAYER.search(name):
            layers[int(match[1])].append(name)
    if len(layers) < count:
        layers.clear()
    in_layers = {name for names in layers.values() for name in names}
    single = sorted(size.keys() - in_layers, key=lambda name: (-size[name], name))
    return [[name] for name in single] + [layers[n] for n in sorted(layers)]


def _bytes(array: Array) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


class Fragments:
    """The outer optimizer of a model in fragments: a step along one at a time.

    Parameters
    ----------
    count : int
        At most as many as the model has tensors.
    lr, momentum, nesterov :
        See `strategies.parts.outer.OuterSGD`; every fragment has a momentum of its own.
    """

    persistent = ()

    def __init__(self, count: int, lr: float, momentum: float, nesterov: bool = True) -> None:
        self._outers = [OuterSGD(lr, momentum, nesterov) for _ in range(count)]
        self._parts: list[list[str]] = []

    def models_kept(self, sites: int) -> int:
        """Return what the momenta of all fragments are together."""
        return self._outers[0].models_kept(sites)

    def parts(self, arrays: Mapping[str, Array]) -> list[list[str]]:
        """Return the names of every fragment's tensors."""
        if not self._parts:
            self._parts = fragments(arrays, len(self._outers))
        return self._parts

    def step(
        self,
        keep: Keep,
        theta: ArrayRecord,
        index: int,
        delta_of: Callable[[str], Lazy],
    ) -> Tensors:
        """Return the next version's tensors, of which those of one fragment are new."""
        chosen = set(self.parts(theta)[index])
        part = part_of(theta, [name for name in theta if name in chosen])
        stepped = self._outers[index].step(keep, part, delta_of)
        return (
            next(stepped) if name in chosen else (name, as_is(array))
            for name, array in theta.items()
        )
