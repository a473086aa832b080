"""The life of a request: acquire, submit, collect, arrived; with deadlines and retries."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Message

from flwr_hpc import protocol
from flwr_hpc.protocol import Order, OrderKind
from strategies.engine import messages
from strategies.engine.orders import OrderFactory
from strategies.engine.runtime import Runtime
from strategies.engine.state import Event, Failure, Memory, Plan, Request, SiteState
from strategies.engine.telemetry import Telemetry

MAX_REFUSALS = 10  # pushes of one request that the SuperLink refused, before it has failed once

FIRST_ANSWER_S = 15.0  # of a request: by then it is known whether, and why, it has to queue

# An idle site is looked at so often, or after this share of the walltime that is left there.
IDLE_LOOK_S, IDLE_LOOK_SHARE = 60.0, 0.05


class RequestTracker:
    """Decides what each site is sent next; `strategies.engine.replies` what an answer means.

    Attributes
    ----------
    current, prefetched : dict of str to Request
        By facility: what it works on, and what was submitted to wait there for that to end.
    away : dict of str to list of Request
        By facility: what was given up since the site was away, and is still wanted of it.
    loose : dict of str to Order
        By id: of an interrupted run, and not asked for again yet.
    news : list of Event
        What is to be reported.
    """

    def __init__(self, runtime: Runtime, memory: Memory) -> None:
        self.current: dict[str, Request] = {}
        self.prefetched: dict[str, Request] = {}
        self.away: dict[str, list[Request]] = {}
        self.loose: dict[str, Order] = {}
        self._missed: dict[str, Order] = {}  # by facility: given up for good, and not told yet
        self.news: list[Event] = []
        self.new_orders = False
        self.telemetry = Telemetry(runtime.emit, runtime.clock.now)
        self._settings = runtime.settings
        self._now = runtime.clock.now
        self._memory = memory
        self._orders = OrderFactory(runtime, memory)

    # ---- requests ---------------------------------------------------------------------------

    def take(self, plan: Plan, site: SiteState, order: Order | None = None) -> None:
        """Begin a request; with an `order` of an interrupted run, go on with that."""
        request = Request(site.facility, plan, created=self._now())
        table = self.prefetched if site.facility in self.current else self.current
        table[site.facility] = request
        if order is not None:
            self._orders.adopt(request, order)
            del self.loose[order.id]
        asks = site.launcher and not site.warm and table is self.current
        request.phase = "acquire" if asks and order is None else "submit"

    def unattached(self, facility: str | None = None) -> list[Order]:
        """Return the orders of an interrupted run that no request works on, in their order."""
        left = [o for o in self.loose.values() if facility in (None, o.facility)]
        return sorted(left, key=lambda o: (o.facility, o.seq))

    def due_prefetch(self, facility: str) -> bool:
        """Return whether the next order may be submitted now, beside the running one."""
        request = self.current.get(facility)
        if request is None or facility in self.prefetched or request.phase != "collect":
            return False
        return request.prefetch_at is not None and self._now() >= request.prefetch_at

    def claimed(self, kind: OrderKind) -> bool:
        """Return whether an order of this kind is on its way."""
        return any(r.kind == kind and r.order is not None for r in self.current.values())

    def collect(self) -> list[Event]:
        """Return and forget what is to be reported."""
        news, self.news = self.news, []
        return news

    def settle(self, facility: str | None = None) -> None:
        """Forget finished orders."""
        names = list(self.current) if facility is None else [facility]
        for name in names:
            if name in self.current and self.current[name].phase == "arrived":
                self.forget(name)
        if facility is None:  # orders of an interrupted run that nobody asked for again
            for order_id in self.loose:
                del self._memory.orders[order_id]
            self.loose.clear()

    def forget(self, facility: str) -> None:
        """Drop a request and its order; the prefetched one takes its place."""
        self._drop(self.current, facility)
        if facility in self.prefetched:
            self.current[facility] = self.prefetched.pop(facility)

    def abandon(self, facility: str) -> None:
        """Drop all of a facility's requests."""
        self._drop(self.prefetched, facility)
        self._drop(self.current, facility)
        for request in self.away.pop(facility, []):
            self._close(request)
        for order in self.unattached(facility):
            del self._memory.orders[order.id], self.loose[order.id]

    def _drop(self, table: dict[str, Request], facility: str) -> None:
        request = table.pop(facility, None)
        if request is not None:
            self._close(request)

    def _close(self, request: Request) -> None:
        if request.order is not None:
            self._memory.orders.pop(request.order.id, None)

    def forget_requests(self, kind: OrderKind) -> None:
        """Drop the requests of a kind that have not become orders."""
        for request in [r for r in self.current.values() if r.kind == kind and r.order is None]:
            self.forget(request.facility)

    def send_again(self, facility: str) -> None:
        """Submit again what was in flight to a node that is gone."""
        tables = (self.current, self.prefetched)
        found = [table[facility] for table in tables if facility in table]
        for request in [*found, *self.away.get(facility, [])]:
            if request.phase != "arrived":
                self.rewind(request, 0.0)

    # ---- outgoing ---------------------------------------------------------------------------

    def next_message(self, site: SiteState) -> tuple[Message, Request | None] | None:
        """Return what a free site is sent next, if anything."""
        ttl = self._settings.ttl_s
        if site.release:
            site.release = False
            return messages.query(protocol.RELEASE, site.node_id, ttl, wait={"cancel": True}), None
        request = self._turn(site.facility)
        if request is None:
            return self._look(site)
        if request.phase == "acquire":
            wait = {"wait_s": self._wait_s(request)}
            return messages.query(protocol.ACQUIRE, site.node_id, ttl, wait=wait), request
        order = request.order or self._ordered(request, site)
        if order is None:
            return None
        wait_s = self._wait_s(request)
        if request.phase == "collect":
            wait = {"wait_s": wait_s}
            query = messages.query(protocol.COLLECT, site.node_id, ttl, order=order, wait=wait)
            return query, request
        content = request.plan.content
        if content is None:
            options = {**order.options, **({"steps": order.steps} if order.steps else {})}
            part = self._orders.part(request, order)
            content = messages.plain_content(part, options, request.extra_arrays)
        held = wait_s if site.launcher else None
        return messages.submit(order, content, site.node_id, ttl, wait_s=held), request

    def _ordered(self, request: Request, site: SiteState) -> Order | None:
        """Make a request's order, unless it is too early or too late for it."""
        if request.kind == "initialize" and self.claimed("initialize"):
            self.forget(site.facility)  # another site was ready first
            return None
        if self.news:
            return None  # what has just arrived may make newer weights
        running = self.current[request.facility]
        self._orders.make(request, site, None if running is request else running.order)
        self.new_orders = True
        return request.order

    def _look(self, site: SiteState) -> tuple[Message, None] | None:
        """Ask an idle site how it is, now and then: that has it see to its next allocation."""
        if not site.warm or site.ends_at is None or site.facility in self.current:
            return None
        now = self._now()
        pause = max(IDLE_LOOK_S, IDLE_LOOK_SHARE * (site.ends_at - now))
        if now < site.heard_at + pause:
            return None
        return messages.query(protocol.DESCRIBE, site.node_id, self._settings.ttl_s), None

    def _turn(self, facility: str) -> Request | None:
        """Return the request whose turn it is: the prefetched one, while the other is trained."""
        request, ahead = self.current.get(facility), self.prefetched.get(facility)
        if request is None or request.phase == "arrived":
            return None
        if request.phase == "collect" and ahead is not None and ahead.phase == "submit":
            request = ahead
        return request if self._now() >= request.not_before else None

    def _wait_s(self, request: Request) -> float:
        """Return how long the site may hold the message: a prefetch must not wait for it."""
        wait_s, now = self._settings.wait_s, self._now()
        if self.prefetched.get(request.facility) is request:
            return 0.0
        if request.phase == "acquire" and not request.asked:
            return min(wait_s, FIRST_ANSWER_S)
        after_s = request.plan.prefetch_after_s
        if after_s is not None and request.facility not in self.prefetched:
            at = now + after_s if request.prefetch_at is None else request.prefetch_at
            wait_s = min(wait_s, max(0.0, at - now))
        return wait_s

    def pushed(self, request: Request | None, taken: bool) -> None:
        """Note that a message was sent, or refused by the SuperLink."""
        if request is None:
            return
        if not taken:
            request.refusals += 1
            request.not_before = self._now() + self._settings.retry_delay_s
            if request.refusals > MAX_REFUSALS:
                request.refusals = 0
                self.fail(request, "the SuperLink refuses the message (node gone, or too large)")
            return
        request.refusals, request.asked = 0, True
        if request.order is None or request.phase != "submit":
            return
        if request.submitted_at is None:
            request.submitted_at = self._now()
        self.telemetry.sent(request.order, request.attempts + 1)

    # ---- failures ---------------------------------------------------------------------------

    def fail(self, request: Request, reason: str, *, final: bool = False) -> None:
        """Count a failed attempt: the same order is sent again, or given up."""
        if not self.alive(request):
            return
        request.attempts += 1
        self.telemetry.failed(request, reason)
        if not final and request.attempts <= self._settings.retries:
            self.rewind(request, self._settings.retry_delay_s)
        elif self.prefetched.get(request.facility) is request:
            self._drop(self.prefetched, request.facility)
        else:
            self.forget(request.facility)
            self.news.append(Failure(request.facility, request.kind, reason, request.order_id))

    def exclude(self, site: SiteState, request: Request, reason: str) -> None:
        """Leave a site out that says what trying again will not fix; the others go on."""
        self.telemetry.failed(request, reason, fatal=True)
        if self.prefetched.get(site.facility) is request:  # the running one may still end well
            self._drop(self.prefetched, site.facility)
            return
        self._leave_out(site, reason)

    def shut_out(self, site: SiteState, reason: str) -> None:
        """Give up at once what a site has to do that takes part no more; the others go on."""
        for table in (self.current, self.prefetched):
            request = table.get(site.facility)
            if request is not None and request.phase != "arrived":
                self.telemetry.failed(request, reason, fatal=True)
        self._leave_out(site, reason)

    def _leave_out(self, site: SiteState, reason: str) -> None:
        site.refusal = reason
        self.telemetry.excluded(site.facility, reason)
        request = self.current.get(site.facility)
        self.abandon(site.facility)
        if request is not None and request.phase != "arrived":
            self.news.append(
                Failure(site.facility, request.kind, reason, request.order_id, fatal=True)
            )

    def alive(self, request: Request) -> bool:
        """Return whether a request is not forgotten."""
        name = request.facility
        return request in (self.current.get(name), self.prefetched.get(name))

    def rewind(self, request: Request, delay_s: float) -> None:
        """Have a request submitted again after a while."""
        if request.order is not None:
            request.phase = "submit"
        request.not_before = self._now() + delay_s

    def expire(self, sites: Mapping[str, SiteState]) -> None:
        """Give up what has waited for too long."""
        now, s = self._now(), self._settings
        for request in [r for r in self.current.values() if r.phase != "arrived"]:
            site, since = sites[request.facility], request.submitted_at
            if not site.reachable(now, s.offline_grace_s):
                self._set_aside(request, f"offline for more than {s.offline_grace_s:g} s")
            elif _over(s.acquire_deadline_s, now, request.created) and request.phase == "acquire":
                site.release = site.launcher
                self.fail(request, f"no allocation within {s.acquire_deadline_s:g} s", final=True)
            elif since is not None and _over(s.order_deadline_s, now, since):
                self.fail(request, f"not done within {s.order_deadline_s:g} s", final=True)

    def _set_aside(self, request: Request, reason: str) -> None:
        """Wait no longer for a site that is away; what is still wanted of it is taken later."""
        name = request.facility
        both = [r for r in (self.current.pop(name), self.prefetched.pop(name, None)) if r]
        for one in both:
            self.telemetry.failed(one, reason)
            if one.order is not None and one.plan.late:
                self.away.setdefault(name, []).append(one)
                continue
            self._close(one)
            if one.order is not None and one.kind == "train":
                self._missed[name] = one.order
        self.news.append(Failure(name, request.kind, reason, request.order_id))

    def take_up(self, site: SiteState) -> None:
        """Go on with what was given up while a site was away, now that it is back."""
        name = site.facility
        if (order := self._missed.pop(name, None)) is not None:
            self.telemetry.too_late(order, self._settings.offline_grace_s)
        if name in self.away and name not in self.current:
            self.current[name], *ahead = self.away.pop(name)
            if ahead:
                self.prefetched[name] = ahead[0]


def _over(deadline_s: float | None, now: float, since: float) -> bool:
    return deadline_s is not None and now - since > deadline_s
