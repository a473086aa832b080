"""What a site's answer means for the request it belongs to, and whether it is refused.

Weights that came by the exchange have been checked in `flwr_hpc.exchange.grid` before.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord, Message

from flwr_hpc.protocol import Order, Status
from strategies.engine import messages
from strategies.engine.requests import RequestTracker
from strategies.engine.runtime import Runtime
from strategies.engine.state import InFlight, Memory, Request, SiteResult, SiteState
from strategies.engine.transport import NODE_UNAVAILABLE
from strategies.engine.validate import reply_fault
from strategies.parts.norms import Judged, UpdateNorms, scaled_update

WARM = ("ready", "running", "done")
KNOWN = ("queued", "starting", "ready", "running", "done")  # the site has the order


class ReplyReader:
    """Moves requests on by what the sites answer."""

    def __init__(self, tracker: RequestTracker, runtime: Runtime, memory: Memory) -> None:
        self._tracker = tracker
        self._telemetry = tracker.telemetry
        self._runtime = runtime
        self._settings = runtime.settings
        self._now = runtime.clock.now
        self._memory = memory
        s = runtime.settings
        self._norms = UpdateNorms(
            s.update_norm_limit, s.clip_update_norm, s.clip_update_quantile, memory.norms
        )

    def read(self, site: SiteState, flight: InFlight, message: Message) -> None:
        """Take a reply; one to a request that is forgotten tells of the allocation only."""
        status = messages.read_status(message)
        self._note(site, status)
        request = flight.request
        if request is None or not self._tracker.alive(request) or request.phase == "arrived":
            return
        ahead = self._tracker.prefetched.get(site.facility) is request
        if ahead and status is not None and status.state in KNOWN:
            request.phase = "collect"  # its turn comes when the running one has arrived
        elif message.has_error():
            self._error(request, message)
        elif not site.launcher:
            self._arrive(site, request, message, None)
        elif status is None:
            self._tracker.fail(request, "a reply without a status")
        elif status.state == "blocked":  # the site says why; nobody's failure
            request.not_before = self._now() + self._settings.retry_delay_s
        elif status.state == "failed":
            self._failed(site, request, status)
        else:
            self._progress(site, request, flight, message, status)

    def _progress(
        self, site: SiteState, request: Request, flight: InFlight, message: Message, status: Status
    ) -> None:
        if request.phase == "acquire":
            if status.state in WARM:
                request.phase = "submit"
            else:
                self._pause(request, flight)
        elif status.state == "done":
            self._arrive(site, request, message, status)
        elif status.state in ("running", "queued", "starting"):
            self._telemetry.progress(request, status)
            request.phase = "collect"
            self._pause(request, flight)
        else:  # idle, ready: the site knows nothing of the order
            self._tracker.fail(request, f"the site is {status.state} and has lost the order")

    def _note(self, site: SiteState, status: Status | None) -> None:
        """Note how a site's allocation is."""
        site.heard_at = now = self._now()
        site.warm = status is not None and status.state in WARM and bool(status.allocation)
        if status is not None:
            left = status.walltime_left_s
            site.ends_at = None if left is None else now + left
            blocked = status.state == "blocked"
            self._telemetry.trouble(site.facility, status.reason if blocked else "")
            self._telemetry.allocation(site, status)

    def _error(self, request: Request, message: Message) -> None:
        if message.error.code == NODE_UNAVAILABLE:  # the site's absence, not the order's fault
            self._tracker.rewind(request, self._settings.retry_delay_s)
            return
        reason = (message.error.reason or "").strip()
        self._tracker.fail(request, f"error {message.error.code}: {reason}")

    def _failed(self, site: SiteState, request: Request, status: Status) -> None:
        result = status.result
        reason = status.error or (result.error if result else "") or "failed without a reason"
        if status.fatal or (result is not None and result.fatal):
            self._tracker.exclude(site, request, reason)
            return
        self._tracker.fail(request, reason, final=result is not None and result.refused)

    def _pause(self, request: Request, flight: InFlight) -> None:
        """Keep a site that answers at once from being asked without end."""
        request.not_before = flight.sent_at + self._settings.poll_s

    def _arrive(
        self, site: SiteState, request: Request, message: Message, status: Status | None
    ) -> None:
        order = request.order
        assert order is not None  # only a submitted request is answered so
        if site.launcher:
            message.content = messages.asked_only(message.content, order)
        arrays = messages.arrays_of(message)
        wrong = reply_fault(request, message, arrays, status, site.launcher, self._runtime.check)
        judged = Judged(wrong) if wrong else self._judge(site, request, arrays)
        wrong = judged.fault
        if wrong:
            self._telemetry.rejected(order, wrong)
            self._tracker.fail(request, f"rejected: {wrong}")
            return
        request.phase = "arrived"
        metrics = messages.flat_metrics(message)
        if judged.scale < 1.0 and arrays is not None and request.base is not None:
            arrays = scaled_update(request.base, arrays, judged.scale)
            message.content = messages.with_arrays(message.content, arrays)
            metrics["update_scale"] = judged.scale
        if status is not None and status.result is not None:
            metrics = {**metrics, **status.result.metrics}
        now = self._now()
        took_s = now - (now if request.submitted_at is None else request.submitted_at)
        self._telemetry.done(order, metrics, status, took_s)
        self._evaluated(site, order, metrics)
        self._tracker.news.append(
            SiteResult(
                order, request.base, arrays, metrics, message, status, took_s, request.resumed
            )
        )

    def _judge(self, site: SiteState, request: Request, arrays: ArrayRecord | None) -> Judged:
        checked = request.kind == "train" and (site.launcher or request.plan.checked)
        if not checked or arrays is None or request.base is None:
            return Judged()
        return self._norms.judge(request.facility, request.base, arrays)

    def _evaluated(self, site: SiteState, order: Order, metrics: Mapping[str, float]) -> None:
        loss = metrics.get("held_out_loss")
        if order.kind != "evaluate" and (not order.evaluate or loss is None):
            return
        site.evaluated = max(site.evaluated, order.version)
        self._memory.evaluated[site.facility] = site.evaluated
        if loss is not None:
            self._telemetry.evaluated(order, loss)
