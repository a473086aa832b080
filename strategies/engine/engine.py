"""The engine: requests of a strategy's loop become idempotent orders at the facilities.

Orders are bound to facilities and not to nodes, since a restarted SuperNode is a new node. A
launcher site is asked for an allocation first (ACQUIRE); the weights are chosen when it is
ready (late binding), submitted, and the result is collected by long polls. An ordinary Flower
ClientApp gets its message directly and is waited for. A facility has one order at work and, if the
strategy plans so, a next one that waits there.

An order counts as in flight until the loop settles it; its number and version are committed
before it is sent, so that a resumed run sends the same orders again and neither reuses a number
nor trains anything twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Set
from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from flwr_hpc.protocol import RELEASE, Order
from strategies.engine import messages
from strategies.engine.orders import extra_name
from strategies.engine.replies import ReplyReader
from strategies.engine.requests import RequestTracker
from strategies.engine.runtime import FatalSiteError, RunFailed, Runtime, Stopped
from strategies.engine.sites import SiteRegistry
from strategies.engine.state import (
    Binding,
    Event,
    Failure,
    InFlight,
    Memory,
    Plan,
    Request,
    SiteState,
)
from strategies.engine.transport import MessageTransport


def global_name(version: int) -> str:
    """Return the name of a global model in the checkpoint store."""
    return f"global-{version}"


class Engine:
    """The push/pull loop over any Flower Grid.

    Attributes
    ----------
    sites : dict of str to SiteState
        By facility.
    restored : dict or None
        What the loop committed before the run was interrupted.
    """

    def __init__(self, grid: Grid, runtime: Runtime) -> None:
        self.grid = grid
        self.runtime = runtime
        self.restored: dict[str, Any] | None = None
        self._memory = Memory()
        self._state: dict[str, Any] = {}
        self._tensors: list[str] = []
        self._transport = MessageTransport(grid, runtime.clock, runtime.settings)
        self._tracker = RequestTracker(runtime, self._memory)
        self._replies = ReplyReader(self._tracker, runtime, self._memory)
        self._registry = SiteRegistry(runtime, self._memory, self._moved)
        self.sites = self._registry.sites
        self.facility_of = self._registry.facility_of
        self._restore()

    # ---- what a loop calls ------------------------------------------------------------------

    def request(self, facility: str, plan: Plan) -> None:
        """Ask a facility for one piece of work.

        `plan.bind` chooses the weights when the order is submitted; without one it gets none.

        Raises
        ------
        ValueError
            If the facility is not known, or still works on another request and is not due
            for a prefetch.
        """
        if facility not in self.sites:
            raise ValueError(f"facility '{facility}' is not known. Known: {sorted(self.sites)}")
        if self.busy(facility) and not self.due_prefetch(facility):
            raise ValueError(f"facility '{facility}' still works on another request")
        if not self.sites[facility].launcher:  # it takes one message, and knows no others
            plan = dataclasses.replace(plan, prefetch_after_s=None, extra_arrays={})
        self._tracker.take(plan, self.sites[facility])

    def resume(self, plan_of: Callable[[Order], Plan | None]) -> None:
        """Go on with the orders that were in flight when the run was interrupted.

        ``plan_of(order)`` is the plan it was made from; None leaves the order alone.
        """
        for order in self._tracker.unattached():
            if order.facility in self.sites and order.facility not in self._tracker.prefetched:
                plan = plan_of(order)
                if plan is not None:
                    self._tracker.take(plan, self.sites[order.facility], order)

    def events(self, timeout: float = 0.0) -> list[Event]:
        """Advance once and return what came of it.

        Sleeps one poll interval if nothing happened, and goes on until `timeout` seconds have
        passed or there is something to report.

        Raises
        ------
        Stopped
            If the stop flag is up.
        """
        until = self.now() + timeout
        while True:
            self._step()
            found = self._tracker.collect()
            if found or self.now() >= until:
                return found

    def busy(self, facility: str) -> bool:
        """Return whether a request of this facility is not settled yet."""
        return facility in self._tracker.current

    def due_prefetch(self, facility: str) -> bool:
        """Return whether a busy facility may be given its next order now."""
        return self._tracker.due_prefetch(facility)

    def settle(self, facility: str | None = None) -> None:
        """Forget finished orders (of one facility, or all): the next `commit` makes it last."""
        self._tracker.settle(facility)

    def abandon(self, facility: str) -> None:
        """Forget a request; its result, should there be one, is ignored."""
        self._tracker.abandon(facility)

    def note(self, state: dict[str, Any], tensors: Iterable[str] = ()) -> None:
        """Take the loop's state for the next `commit`; ``tensors`` are those it needs."""
        self._state, self._tensors = dict(state), list(tensors)

    def commit(self) -> None:
        """Checkpoint the loop's last noted state together with the engine's."""
        orders = self._memory.orders.values()
        needed = {extra_name(key, order) for order in orders for key in order.extra_arrays}
        if self._state:
            versions = {order.version for order in orders}  # few of many orders
            needed |= {global_name(version) for version in versions if version >= 0}
        self.runtime.checkpoints.commit(
            {
                **self._state,
                "engine": self.state_dict(),
                "tensors": sorted(needed | set(self._tensors)),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the engine's part of a checkpoint, as JSON."""
        m = self._memory
        return {
            "seq": dict(m.seq),
            "evaluated": dict(m.evaluated),
            "norms": dict(m.norms),
            "orders": [vars(order) for order in m.orders.values()],
        }

    def now(self) -> float:
        """Return the time on the run's clock."""
        return self.runtime.clock.now()

    def reachable(self) -> list[SiteState]:
        """Return the sites that take part and are online or were so within the grace, by name."""
        grace, now = self.runtime.settings.offline_grace_s, self.now()
        sites = [s for _, s in sorted(self.sites.items()) if not s.refusal]
        return [s for s in sites if s.reachable(now, grace)]

    def require(self, count: int) -> None:
        """End the run if so many sites are left out that fewer than `count` remain.

        Raises
        ------
        FatalSiteError
            With the reasons of those that are left out.
        """
        reasons = {n: s.refusal for n, s in self.sites.items() if s.refusal}
        if not reasons:
            return
        left = sorted(self.sites.keys() - reasons.keys())
        if len(left) >= count:
            return
        words = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
        if left:
            words += f"\nA round needs {count} sites; left: {', '.join(left)}."
        raise FatalSiteError(words)

    @property
    def num_reachable(self) -> int:
        """How many sites are online or were so within the grace, by the last look at them."""
        return self._registry.num_reachable

    def wait_for(self, facilities: Iterable[str] | int, timeout: float | None = None) -> list[str]:
        """Wait until facilities (by name, or so many of any) are online.

        Raises
        ------
        RunFailed
            If they are not after `timeout` seconds of the clock (None: wait for ever).
        """
        until = None if timeout is None else self.now() + timeout
        while True:
            here = sorted(name for name, site in self.sites.items() if site.online)
            missing = _missing(facilities, here)
            if not missing:
                return here
            if until is not None and self.now() >= until:
                raise RunFailed(
                    f"waited {timeout:.0f} s for {missing}. Online: {', '.join(here) or 'none'}. "
                    "Look at the logs of their SuperNodes."
                )
            self._step()

    def discover(self) -> None:
        """Advance once without reporting; what arrives is kept for `events`."""
        self._step()

    def initialize(self) -> tuple[ArrayRecord, dict[str, str]]:
        """Have the first site that gets an allocation make the initial weights.

        Returns
        -------
        arrays : ArrayRecord
        files : dict of str to str
            Small text files that belong to the weights.

        Raises
        ------
        RunFailed
            If no launcher site is left that could.
        """
        failed: dict[str, str] = {}
        plan = Plan(kind="initialize", bind=lambda running: Binding(0, None))
        while True:
            self.resume(lambda order: plan if order.kind == "initialize" else None)
            self.require(1)
            able = [
                name
                for name, site in sorted(self.sites.items())
                if site.launcher and not site.refusal and name not in failed
            ]
            if self.sites and not able:
                raise RunFailed(f"no site could make the initial weights: {failed}")
            if not self._tracker.claimed("initialize"):
                for facility in able:
                    if not self.busy(facility):
                        self.request(facility, plan)
            for event in self.events():
                if isinstance(event, Failure):
                    failed[event.facility] = event.reason
                elif event.arrays is not None:
                    self._tracker.forget_requests("initialize")
                    result = event.status.result if event.status else None
                    return event.arrays, dict(result.files) if result else {}

    def release(self, timeout: float = 30.0) -> None:
        """Let all allocations end; waits briefly for the answers."""
        online = set(self._transport.online())
        ttl = self.runtime.settings.ttl_s
        parcels: list[tuple[Message, Request | None]] = [
            (messages.query(RELEASE, site.node_id, ttl), None)
            for _, site in sorted(self.sites.items())
            if site.launcher and site.node_id in online
        ]
        self._transport.push(parcels)
        self._tracker.current.clear()
        self._tracker.prefetched.clear()
        until = self.now() + timeout
        while self._transport.waiting_for(RELEASE) and self.now() < until:
            if not self._receive(self._transport.online()):
                self.runtime.clock.sleep(self.runtime.settings.poll_s)
        self._transport.drop_releases()

    # ---- one step ---------------------------------------------------------------------------

    def _step(self) -> None:
        if self.runtime.stop.is_set():
            raise Stopped("the run was asked to stop")
        restarted = self.runtime.restarted()  # first: they are online by then, and are heard out
        online = self._transport.online()
        self._registry.roll_call(set(online))
        self._shut_out()
        for site in self.sites.values():
            if site.online:
                self._tracker.take_up(site)
        received = self._receive(online)
        self._send_again(restarted)
        self._lose(online)
        self._tracker.expire(self.sites)
        if not self._send(online) and not received and not self._tracker.news:
            self.runtime.clock.sleep(self.runtime.settings.poll_s)

    def _shut_out(self) -> None:
        """Wait no longer for sites that are revoked: what they still say does not come here."""
        for facility, reason in self.runtime.revoked().items():
            site = self.sites.get(facility)
            if site is not None and not site.refusal:
                self._transport.drop(site.node_id)
                self._tracker.shut_out(site, reason)

    def _moved(self, facility: str, old_node: int) -> None:
        """What was in flight to a node that is gone is sent to its successor."""
        self._transport.drop(old_node)
        self._tracker.send_again(facility)

    def _receive(self, online: list[int]) -> bool:
        replies = self._transport.pull(online)
        for flight, message in replies:
            if flight.node_id not in self.facility_of:
                self._registry.described(flight.node_id, message)
            else:
                site = self.sites[self.facility_of[flight.node_id]]
                self._replies.read(site, flight, message)
        return bool(replies)

    def _send_again(self, restarted: Set[int]) -> None:
        """Send what a SuperNode took with it to its successor; a site does nothing twice."""
        for node_id in restarted:
            self._registry.take_back(node_id)
        for flight in self._transport.lose(restarted):
            if flight.request is not None:
                self._tracker.rewind(flight.request, 0.0)

    def _lose(self, online: list[int]) -> None:
        launchers = {n for n, f in self.facility_of.items() if self.sites[f].launcher}
        undescribed = set(online) - set(self.facility_of)
        overdue = self._transport.overdue(online, launchers | undescribed, self._lost)
        for flight, reason in overdue:
            facility = self.facility_of.get(flight.node_id, "")
            self._tracker.telemetry.reply_lost(facility, flight.kind, reason)
            if flight.request is not None:
                self._tracker.fail(flight.request, f"no reply: {reason}")

    def _lost(self, message_id: str, flight: InFlight) -> str:
        facility = self.facility_of.get(flight.node_id, "")
        return self.runtime.lost(facility, message_id, flight.sent_at) if facility else ""

    def _send(self, online: list[int]) -> bool:
        busy = self._transport.busy()
        free = [n for n in online if n not in busy]
        parcels = [p for p in map(self._next, free) if p is not None]
        if self._tracker.new_orders:
            self.commit()  # ahead of the push: a number once sent is never used again
            self._tracker.new_orders = False
        taken = self._transport.push(parcels)
        for (_, request), ok in zip(parcels, taken, strict=True):
            self._tracker.pushed(request, ok)
        return any(taken)

    def _next(self, node_id: int) -> tuple[Message, Request | None] | None:
        facility = self.facility_of.get(node_id)
        if facility is None:
            message = self._registry.question(node_id)
            return None if message is None else (message, None)
        site = self.sites[facility]
        return self._tracker.next_message(site) if site.node_id == node_id else None

    def _restore(self) -> None:
        state = self.runtime.checkpoints.restore()
        if state is None:
            return
        saved = state.pop("engine", {})
        self._memory.seq.update(saved.get("seq", {}))
        self._memory.evaluated.update(saved.get("evaluated", {}))
        self._memory.norms.update(saved.get("norms", {}))
        orders = [Order(**order) for order in saved.get("orders", [])]
        self._memory.orders.update({order.id: order for order in orders})
        self._tracker.loose.update(self._memory.orders)
        self._tensors = list(state.pop("tensors", []))
        self._state = state
        self.restored = state or None


def _missing(wanted: Iterable[str] | int, here: list[str]) -> str:
    if isinstance(wanted, int):
        return f"{wanted - len(here)} more site(s)" if len(here) < wanted else ""
    return ", ".join(name for name in wanted if name not in here)
