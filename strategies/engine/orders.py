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


def extra_name(key: str, order: Order) -> str:
    """Return the name, in the checkpoint store, of what an order carries beside the weights."""
    return f"{key}-{order.id}"


class OrderFactory:
    """Makes orders, and cuts out what of the weights travels with them."""

    def __init__(self, runtime: Runtime, memory: Memory) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._memory = memory
        self._parts: WeakValueDictionary[Any, ArrayRecord] = WeakValueDictionary()
        self._made: dict[str, list[Order]] = {}  # by facility; some may be no longer open

    def make(self, request: Request, site: SiteState, running: Order | None) -> None:
        """Give a request its weights and its number; `running` is under way at the site."""
        plan = request.plan
        binding = plan.bind(running) if plan.bind else Binding(0, None)
        request.base = binding.arrays
        seq = self._memory.seq.get(site.facility, 0)
        self._memory.seq[site.facility] = seq + 1
        order = Order(
            run_key=self._runtime.run_key,
            facility=site.facility,
            seq=seq,
            kind=plan.kind,
            version=binding.version,
            steps=plan.steps,
            evaluate=plan.kind == "train" and binding.evaluate and self._due(site, binding.version),
            options={**self._runtime.options, **plan.options, **binding.options},
            merges=binding.merges,
            returns=binding.returns,
            settled=self._settled(site, seq),
        )
        request.order = order = self._with_extra_arrays(request, order)
        self._memory.orders[order.id] = order
        self._made[site.facility].append(order)

    def adopt(self, request: Request, order: Order) -> None:
        """Let a request go on with an order of an interrupted run; what it carries is the same."""
        plan, store = request.plan, self._runtime.checkpoints
        request.order, request.resumed = order, True
        request.base = plan.bind(None).arrays if plan.bind else None
        request.extra_arrays = {k: store.get(extra_name(k, order)) for k in order.extra_arrays}

    def part(self, request: Request, order: Order) -> ArrayRecord | None:
        """Return the weights that travel with an order; one record for all sites."""
        if order.merges is None or request.base is None:
            return request.base
        if request.part is None:
            key = order.version, tuple(order.merges)
            request.part = self._parts.get(key)
            if request.part is None:
                request.part = messages.part_of(request.base, order.merges)
                self._parts[key] = request.part
        return request.part or None

    def _with_extra_arrays(self, request: Request, order: Order) -> Order:
        store = self._runtime.checkpoints
        made = {key: make() for key, make in request.plan.extra_arrays.items()}
        request.extra_arrays = {
            key: store.put(extra_name(key, order), tensors)
            for key, tensors in made.items()
            if tensors is not None
        }
        return dataclasses.replace(order, extra_arrays=sorted(request.extra_arrays))

    def _settled(self, site: SiteState, seq: int) -> int:
        """Return below which number no order is open; the commit ahead of sending makes it last."""
        return min((order.seq for order in self._open(site)), default=seq)

    def _open(self, site: SiteState) -> list[Order]:
        """Return a site's open orders; sought among all at first: a resumed run has some."""
        orders = self._memory.orders
        made = self._made.get(site.facility)
        if made is None:
            made = [order for order in orders.values() if order.facility == site.facility]
        made = self._made[site.facility] = [order for order in made if order.id in orders]
        return made

    def _due(self, site: SiteState, version: int) -> bool:
        """Return whether a version is to be evaluated at a site, and nobody has done or will."""
        every = self._settings.evaluate_every
        if not (every > 0 and version % every == 0) or site.evaluated == version:
            return False
        return not any(o.evaluate and o.version == version for o in self._open(site))
