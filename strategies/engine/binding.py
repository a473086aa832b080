"""Late binding: a request becomes an order with the newest weights and the next number."""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakValueDictionary

from flwr.app import ArrayRecord

from flwr_hpc.protocol import Order
from strategies.engine import messages
from strategies.engine.runtime import Runtime
from strategies.engine.state import Binding, Memory, Request, SiteState


def further_name(key: str, order: Order) -> str:
    """Return the name, in the checkpoint store, of what an order carries beside the weights."""
    return f"{key}-{order.id}"


class Binder:
    """Makes orders, and cuts out what of the weights travels with them."""

    def __init__(self, runtime: Runtime, memory: Memory) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._memory = memory
        self._parts: WeakValueDictionary[Any, ArrayRecord] = WeakValueDictionary()

    def bind(self, work: Request, site: SiteState, running: Order | None) -> None:
        """Give a request its weights and its number; `running` is under way at the site."""
        bound = work.bind(running) if work.bind else Binding(*work.weights())
        version, work.base = bound.version, bound.arrays
        work.options = {**work.options, **bound.options}
        seq = self._memory.seq.get(site.facility, 0)
        self._memory.seq[site.facility] = seq + 1
        every = self._settings.evaluate_every
        order = Order(
            run_key=self._runtime.run_key,
            facility=site.facility,
            seq=seq,
            kind=work.kind,
            version=version,
            steps=work.steps,
            evaluate=work.kind == "train"
            and every > 0
            and version % every == 0
            and bound.evaluate
            and not self._evaluates(site, version),
            options=work.options,
            merges=bound.merges,
            returns=bound.returns,
        )
        work.order = order = self._furnish(work, order)
        self._memory.orders[order.id] = order

    def part(self, work: Request, order: Order) -> ArrayRecord | None:
        """Return the weights that travel with an order; one record for all sites."""
        if order.merges is None or work.base is None:
            return work.base
        if work.part is None:
            key = order.version, tuple(order.merges)
            work.part = self._parts.get(key)
            if work.part is None:
                work.part = self._parts[key] = messages.part_of(work.base, order.merges)
        return work.part or None

    def _furnish(self, work: Request, order: Order) -> Order:
        """Make and store what the order carries beside the weights; sent again, it is the same."""
        store = self._runtime.checkpoints
        made = {key: make() for key, make in work.makes.items()}
        work.further = {
            key: store.put(further_name(key, order), tensors)
            for key, tensors in made.items()
            if tensors is not None
        }
        return dataclasses.replace(order, carries=sorted(work.further))

    def _evaluates(self, site: SiteState, version: int) -> bool:
        """Return whether a version has been evaluated at a site, or will be."""
        mine = (o for o in self._memory.orders.values() if o.facility == site.facility)
        return site.evaluated == version or any(o.evaluate and o.version == version for o in mine)
