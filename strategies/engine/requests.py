"""The life of a request: acquire, hand in, collect, arrived; with deadlines and retries."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Message

from flwr_hpc import protocol
from flwr_hpc.protocol import Order, Status
from strategies.engine import messages
from strategies.engine.binding import Binder, further_name
from strategies.engine.runtime import FatalSiteError, Runtime
from strategies.engine.state import Event, Failure, InFlight, Memory, Request, SiteResult, SiteState
from strategies.engine.telemetry import Telemetry
from strategies.engine.transport import NODE_UNAVAILABLE
from strategies.engine.validate_reply import fault

MAX_REFUSALS = 10  # pushes of one request that the SuperLink refused, before it has failed once

FIRST_ANSWER_S = 15.0  # of a request: by then it is known whether, and why, it has to queue

WARM = ("ready", "running", "done")


class RequestTracker:
    """Decides what each site is sent next and what a reply means."""

    def __init__(self, runtime: Runtime, memory: Memory) -> None:
        self.works: dict[str, Request] = {}
        self.ahead: dict[str, Request] = {}  # handed in while the one in `works` is trained
        self.loose: dict[str, Order] = {}  # of an interrupted run, and not asked for again yet
        self.new_orders = False
        self._runtime = runtime
        self._settings = runtime.settings
        self._memory = memory
        self._telemetry = Telemetry(runtime.emit, runtime.clock.now)
        self._news: list[Event] = []
        self._binder = Binder(runtime, memory)

    # ---- requests ---------------------------------------------------------------------------

    def take(self, work: Request, site: SiteState) -> None:
        """Begin a request; an order of an interrupted run that fits is taken up again."""
        known = next(iter(self.unattached(work.facility)), None)
        table = self.ahead if work.facility in self.works else self.works
        table[work.facility] = work
        if known is not None and known.kind == work.kind and work.bind is None:
            version, arrays = work.weights()
            if version == known.version:
                work.order, work.base, work.resumed = known, arrays, True
                store = self._runtime.checkpoints
                work.further = {k: store.get(further_name(k, known)) for k in known.carries}
                del self.loose[known.id]
        asks = site.launcher and not site.warm and table is self.works
        work.phase = "acquire" if asks and work.order is None else "hand_in"

    def unattached(self, facility: str | None = None) -> list[Order]:
        """Return the orders of an interrupted run that no request works on, in their order."""
        left = [o for o in self.loose.values() if facility in (None, o.facility)]
        return sorted(left, key=lambda o: (o.facility, o.seq))

    def due_ahead(self, facility: str) -> bool:
        """Return whether the next order may be handed in now, beside the running one."""
        work = self.works.get(facility)
        if work is None or facility in self.ahead or work.phase != "collect":
            return False
        return work.ahead_at is not None and self._now() >= work.ahead_at

    def claimed(self, kind: str) -> bool:
        """Return whether an order of this kind is on its way."""
        return any(w.kind == kind and w.order is not None for w in self.works.values())

    def collect(self) -> list[Event]:
        """Return and forget what is to be reported."""
        news, self._news = self._news, []
        return news

    @property
    def has_news(self) -> bool:
        """Whether something is to be reported."""
        return bool(self._news)

    def settle(self, facility: str | None = None) -> None:
        """Forget finished orders."""
        names = list(self.works) if facility is None else [facility]
        for name in names:
            if name in self.works and self.works[name].phase == "arrived":
                self.forget(name)
        if facility is None:  # orders of an interrupted run that nobody asked for again
            for order_id in self.loose:
                del self._memory.orders[order_id]
            self.loose.clear()

    def forget(self, facility: str) -> None:
        """Drop a request and its order; the one handed in ahead takes its place."""
        self._drop(self.works, facility)
        if facility in self.ahead:
            self.works[facility] = self.ahead.pop(facility)

    def abandon(self, facility: str) -> None:
        """Drop all of a facility's requests."""
        self._drop(self.ahead, facility)
        self._drop(self.works, facility)
        for order in self.unattached(facility):
            del self._memory.orders[order.id], self.loose[order.id]

    def _drop(self, table: dict[str, Request], facility: str) -> None:
        work = table.pop(facility, None)
        if work is not None and work.order is not None:
            self._memory.orders.pop(work.order.id, None)

    def forget_requests(self, kind: str) -> None:
        """Drop the requests of a kind that have not become orders."""
        for work in [w for w in self.works.values() if w.kind == kind and w.order is None]:
            self.forget(work.facility)

    def send_again(self, facility: str) -> None:
        """Hand in again what was in flight to a node that is gone."""
        for table in (self.works, self.ahead):
            work = table.get(facility)
            if work is not None and work.phase != "arrived":
                self._rewind(work, 0.0)

    # ---- outgoing ---------------------------------------------------------------------------

    def next_message(self, site: SiteState) -> tuple[Message, Request | None] | None:
        """Return what a free site is sent next, if anything."""
        ttl = self._settings.ttl_s
        if site.release:
            site.release = False
            return messages.query(protocol.RELEASE, site.node_id, ttl, wait={"cancel": True}), None
        work = self._turn(site.facility)
        if work is None:
            return None
        wait_s = self._wait_s(work)
        if work.phase == "acquire":
            wait = {"wait_s": wait_s}
            return messages.query(protocol.ACQUIRE, site.node_id, ttl, wait=wait), work
        if work.order is None and work.kind == "initialize" and self.claimed("initialize"):
            self.forget(site.facility)  # another site was ready first
            return None
        if work.order is None and self._news:
            return None  # what has just arrived may make newer weights
        if work.order is None:
            running = self.works[work.facility]
            self._binder.bind(work, site, None if running is work else running.order)
            self.new_orders = True
        order = work.order
        assert order is not None
        if work.phase == "collect":
            wait = {"wait_s": wait_s}
            return messages.query(protocol.COLLECT, site.node_id, ttl, order=order, wait=wait), work
        content = work.content
        if content is None:
            options = {**work.options, **({"steps": work.steps} if work.steps else {})}
            content = messages.plain_content(self._binder.part(work, order), options, work.further)
        wait_or_none = wait_s if site.launcher else None
        return messages.hand_in(order, content, site.node_id, ttl, wait_s=wait_or_none), work

    def _turn(self, facility: str) -> Request | None:
        """Return the request whose turn it is: the one ahead, while the other is trained."""
        work, ahead = self.works.get(facility), self.ahead.get(facility)
        if work is None or work.phase == "arrived":
            return None
        if work.phase == "collect" and ahead is not None and ahead.phase == "hand_in":
            work = ahead
        return work if self._now() >= work.not_before else None

    def _wait_s(self, work: Request) -> float:
        """Return how long the site may hold the message: the order ahead must not wait for it."""
        wait_s, now = self._settings.wait_s, self._now()
        if self.ahead.get(work.facility) is work:
            return 0.0
        if work.phase == "acquire" and not work.asked:
            return min(wait_s, FIRST_ANSWER_S)
        if work.ahead_after_s is not None and work.facility not in self.ahead:
            at = now + work.ahead_after_s if work.ahead_at is None else work.ahead_at
            wait_s = min(wait_s, max(0.0, at - now))
        return wait_s

    def pushed(self, message: Message, work: Request | None, taken: bool) -> None:
        """Note that a message was sent, or refused by the SuperLink."""
        if work is None:
            return
        if not taken:
            work.refusals += 1
            work.not_before = self._now() + self._settings.retry_delay_s
            if work.refusals > MAX_REFUSALS:
                work.refusals = 0
                self.fail(work, "the SuperLink refuses the message (node gone, or too large)")
            return
        work.refusals, work.asked = 0, True
        order = work.order
        if order is None or work.phase != "hand_in":
            return
        work.handed_in = self._now() if work.handed_in is None else work.handed_in
        self._telemetry.sent(order, work.attempts + 1)

    # ---- incoming ---------------------------------------------------------------------------

    def receive(self, site: SiteState, flight: InFlight, message: Message) -> None:
        """Take a reply; one to a request that is forgotten tells of the allocation only."""
        status = messages.read_status(message)
        site.warm = status is not None and status.state in WARM and bool(status.allocation)
        if status is not None:
            left = status.walltime_left_s
            site.ends_at = None if left is None else self._now() + left
            self._telemetry.allocation(site, status)
        work = flight.work
        if work is None or not self._alive(work) or work.phase == "arrived":
            return
        if self.ahead.get(site.facility) is work and status is not None and _parked(status):
            work.phase = "collect"  # its turn comes when the running one has arrived
        elif message.has_error():
            self._error(work, message)
        elif not site.launcher:
            self._arrive(site, work, message, None)
        elif status is None:
            self.fail(work, "a reply without a status")
        elif status.state == "failed":
            self._failed(work, status)
        elif work.phase == "acquire":
            if status.state in ("ready", "running", "done"):
                work.phase = "hand_in"
            else:
                self._pause(work, flight)
        elif status.state == "done":
            self._arrive(site, work, message, status)
        elif status.state in ("running", "queued", "starting"):
            self._telemetry.progress(work, status)
            work.phase = "collect"
            self._pause(work, flight)
        else:  # idle, ready: the site knows nothing of the order
            self.fail(work, f"the site is {status.state} and has lost the order")

    def _error(self, work: Request, message: Message) -> None:
        if message.error.code == NODE_UNAVAILABLE:  # the site's absence, not the order's fault
            self._rewind(work, self._settings.retry_delay_s)
            return
        reason = (message.error.reason or "").strip()
        self.fail(work, f"error {message.error.code}: {reason}")

    def _failed(self, work: Request, status: Status) -> None:
        result = status.result
        reason = status.error or (result.error if result else "") or "failed without a reason"
        if status.fatal or (result is not None and result.fatal):
            self._telemetry.failed(work, reason, fatal=True)
            raise FatalSiteError(f"{work.facility}: {reason}")
        self.fail(work, reason, final=result is not None and result.refused)

    def _pause(self, work: Request, flight: InFlight) -> None:
        """Keep a site that answers at once from being asked without end."""
        work.not_before = flight.sent_at + self._settings.poll_s

    def _arrive(
        self, site: SiteState, work: Request, message: Message, status: Status | None
    ) -> None:
        order = work.order
        assert order is not None  # only a handed-in request is answered so
        arrays = messages.arrays_of(message)
        wrong = fault(work, message, arrays, status, site.launcher, self._runtime.check)
        if wrong:
            self._telemetry.rejected(order, wrong)
            self.fail(work, f"rejected: {wrong}")
            return
        work.phase = "arrived"
        metrics = messages.flat_metrics(message)
        if status is not None and status.result is not None:
            metrics = {**metrics, **status.result.metrics}
        now = self._now()
        took_s = now - (now if work.handed_in is None else work.handed_in)
        self._telemetry.done(order, metrics, status, took_s)
        self._evaluated(site, order, metrics)
        self._news.append(
            SiteResult(order, work.base, arrays, metrics, message, status, took_s, work.resumed)
        )

    def _evaluated(self, site: SiteState, order: Order, metrics: Mapping[str, float]) -> None:
        loss = metrics.get("held_out_loss")
        if order.kind != "evaluate" and (not order.evaluate or loss is None):
            return
        site.evaluated = max(site.evaluated, order.version)
        self._memory.evaluated[site.facility] = site.evaluated
        if loss is not None:
            self._telemetry.evaluated(order, loss)

    # ---- failures ---------------------------------------------------------------------------

    def fail(self, work: Request, reason: str, *, final: bool = False) -> None:
        """Count a failed attempt: the same order is sent again, or given up."""
        if not self._alive(work):
            return
        work.attempts += 1
        self._telemetry.failed(work, reason)
        if final or work.attempts > self._settings.retries:
            if self.ahead.get(work.facility) is work:
                self._drop(self.ahead, work.facility)
                return
            self.forget(work.facility)
            self._news.append(Failure(work.facility, work.kind, reason, work.order_id))
        else:
            self._rewind(work, self._settings.retry_delay_s)

    def _alive(self, work: Request) -> bool:
        return work in (self.works.get(work.facility), self.ahead.get(work.facility))

    def _rewind(self, work: Request, delay_s: float) -> None:
        if work.order is not None:
            work.phase = "hand_in"
        work.not_before = self._now() + delay_s

    def expire(self, sites: Mapping[str, SiteState]) -> None:
        """Give up what has waited for too long."""
        now, s = self._now(), self._settings
        for work in [w for w in self.works.values() if w.phase != "arrived"]:
            site = sites[work.facility]
            if not site.reachable(now, s.offline_grace_s):
                self.fail(work, f"offline for more than {s.offline_grace_s:g} s", final=True)
            elif _over(s.acquire_deadline_s, now, work.created) and work.phase == "acquire":
                site.release = site.launcher
                self.fail(work, f"no allocation within {s.acquire_deadline_s:g} s", final=True)
            elif work.handed_in is not None and _over(s.order_deadline_s, now, work.handed_in):
                self.fail(work, f"not done within {s.order_deadline_s:g} s", final=True)

    def _now(self) -> float:
        return self._runtime.clock.now()


def _parked(status: Status) -> bool:
    """Return whether the site has an order and will work on it."""
    return status.state in ("queued", "starting", "ready", "running", "done")


def _over(deadline_s: float | None, now: float, since: float) -> bool:
    return deadline_s is not None and now - since > deadline_s
