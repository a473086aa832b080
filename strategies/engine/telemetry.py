"""The engine's lines in the event log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr_hpc.protocol import WEIGHT_KEY, Order, Status
from strategies.engine.state import Request, SiteState

# What the state of a site says of its allocation.
ALLOCATION_STATES = {
    "queued": "queued",
    "starting": "starting",
    "ready": "ready",
    "running": "ready",
    "done": "ready",
    "idle": "ended",
}
# A forecast of the same start is no news: it is told again when the start moves by more.
MOVED_S, MOVED_SHARE = 60.0, 0.2


@dataclass
class _Told:
    """What the log knows of one facility's allocations."""

    jobs: dict[str, str] = field(default_factory=dict)
    ledger: dict[str, str] = field(default_factory=dict)
    worker: str = ""  # the allocation that orders are with
    reason: str = ""
    trouble: str = ""
    note: tuple[str, str] = ("", "")  # of which order
    start_s: float | None = None  # forecast start on the engine's clock
    wait_s: float = 0.0  # as forecast then


class Telemetry:
    """Turns what happens to orders and allocations into events.

    Parameters
    ----------
    emit : callable
        Writes an event.
    now : callable
        Seconds on the engine's clock.
    """

    def __init__(self, emit: Callable[..., object], now: Callable[[], float]) -> None:
        self._emit = emit
        self._now = now
        self._told: dict[str, _Told] = {}

    def sent(self, order: Order, attempt: int) -> None:
        """Tell that an order was submitted."""
        self._emit(
            "order_sent",
            facility=order.facility,
            order_id=order.id,
            kind=order.kind,
            version=order.version,
            steps=order.steps,
            attempt=attempt,
        )

    def progress(self, request: Request, status: Status) -> None:
        """Tell how far a running order is, if it has moved."""
        self._note(request.facility, request.order_id, status.note)
        if status.state != "running" or status.step <= request.step:
            return
        request.step = status.step
        self._emit(
            "order_progress",
            facility=request.facility,
            order_id=request.order_id,
            step=status.step,
            steps=status.steps,
            loss=status.loss,
            tokens_per_s=status.tokens_per_s,
        )

    def done(
        self,
        order: Order,
        metrics: Mapping[str, float],
        status: Status | None,
        round_trip_s: float,
    ) -> None:
        """Tell all there is to know of a finished order."""
        result = status.result if status else None
        self._note(order.facility, order.id, result.note if result else "")
        self._emit(
            "order_done",
            facility=order.facility,
            order_id=order.id,
            kind=order.kind,
            version=order.version,
            steps=result.steps if result else order.steps,
            tokens=result.tokens if result else 0,
            examples=result.examples if result else int(metrics.get(WEIGHT_KEY, 0)),
            metrics=dict(metrics),
            seconds=result.seconds if result else {},
            round_trip_s=round_trip_s,
            **self._account(order.facility, status),
        )

    def rejected(self, order: Order, reason: str) -> None:
        """Tell of weights that must not touch the model."""
        self._emit("order_rejected", facility=order.facility, order_id=order.id, reason=reason)

    def _note(self, facility: str, order_id: str, note: str) -> None:
        """Tell what a person should know of an order, once."""
        told = self._told.setdefault(facility, _Told())
        if note and (order_id, note) != told.note:
            told.note = order_id, note
            self._emit("order_note", facility=facility, order_id=order_id, note=note)

    def failed(self, request: Request, reason: str, *, fatal: bool = False) -> None:
        """Tell of a failed attempt."""
        self._emit(
            "order_failed",
            facility=request.facility,
            order_id=request.order_id,
            reason=reason,
            fatal=fatal,
            attempt=request.attempts,
        )

    def too_late(self, order: Order, grace_s: float) -> None:
        """Tell that a site is back whose order nobody waits for any more."""
        self._emit(
            "order_late",
            facility=order.facility,
            order_id=order.id,
            version=order.version,
            reason=f"the site was away for more than {grace_s:g} s "
            "(federation.offline_grace_s), and its round has gone on without it",
        )

    def reply_lost(self, facility: str, kind: str, reason: str) -> None:
        """Tell of a message that is not answered any more."""
        self._emit("reply_lost", facility=facility, kind=kind, reason=reason)

    def trouble(self, facility: str, reason: str) -> None:
        """Tell what keeps a site from working, or that it is over (no reason), once."""
        told = self._told.setdefault(facility, _Told())
        if reason != told.trouble:
            told.trouble = reason
            self._emit("site_trouble", facility=facility, reason=reason)

    def excluded(self, facility: str, reason: str) -> None:
        """Tell that a site is left out of the run."""
        self._emit("site_excluded", facility=facility, reason=reason)

    def evaluated(self, order: Order, loss: float) -> None:
        """Tell the held-out loss of a version at a facility."""
        self._emit("evaluated", facility=order.facility, version=order.version, held_out_loss=loss)

    def allocation(self, site: SiteState, status: Status) -> None:
        """Note the state of a site's allocation, and tell what is new of it and of its jobs."""
        state = ALLOCATION_STATES.get(status.state)
        name = site.allocation if status.state == "idle" else status.allocation
        site.walltime_left_s = status.walltime_left_s
        if state is None or not name:  # a failure, or an answer without an allocation
            name, state = site.allocation, site.allocation_state
        if not name:
            return
        if status.state != "done":  # that may name the next one
            self._told.setdefault(site.facility, _Told()).worker = name
        changed = (name, state) != (site.allocation, site.allocation_state)
        if changed and site.allocation not in ("", name) and site.allocation_state != "ended":
            self._allocation(site.facility, site.allocation, "ended", status)
        if changed or self._has_news(site.facility, state, status):
            site.allocation, site.allocation_state = name, state
            self._allocation(site.facility, name, state, status)

    def _allocation(self, facility: str, name: str, state: str, status: Status) -> None:
        queued, ended = state == "queued", state == "ended"
        told = self._told.setdefault(facility, _Told())
        told.reason = status.reason if queued else ""
        wait_s = status.queue_wait_s if queued else None
        told.start_s = None if wait_s is None else self._now() + wait_s
        told.wait_s = wait_s or 0.0
        # Of a finished order its own event tells next: what it cost belongs to that.
        account = {} if status.state == "done" else self._account(facility, status)
        self._emit(
            "allocation",
            facility=facility,
            allocation=name,
            state=state,
            queue_wait_s=wait_s,
            queue_wait_high_s=status.queue_wait_high_s if queued else None,
            reason=told.reason,
            walltime_left_s=None if ended else status.walltime_left_s,
            **account,
        )

    def _has_news(self, facility: str, state: str, status: Status) -> bool:
        """Whether a known allocation's job, reason to wait or forecast start has changed."""
        if status.state == "done":  # told with the order
            return False
        told = self._told.setdefault(facility, _Told())
        if any(told.jobs.get(name) != _text(job) for name, job in status.jobs.items()):
            return True
        if state != "queued":
            return False
        if status.reason != told.reason or (status.queue_wait_s is None) != (told.start_s is None):
            return True
        if status.queue_wait_s is None or told.start_s is None:
            return False
        moved = abs(self._now() + status.queue_wait_s - told.start_s)
        return moved > max(MOVED_S, MOVED_SHARE * told.wait_s)

    def _account(self, facility: str, status: Status | None) -> dict[str, Any]:
        """Return ledger and jobs: of the allocations that work, and what is new of others.

        A log of everything each time would grow with the square of the allocations.
        """
        if status is None:
            return {"ledger": {}, "jobs": {}}
        told = self._told.setdefault(facility, _Told())
        working = {told.worker, status.allocation}
        jobs, told.jobs = _news(status.jobs, told.jobs, working)
        ledger, told.ledger = _news(status.ledger, told.ledger, working)
        return {"ledger": ledger, "jobs": jobs}


def _news(
    now: Mapping[str, Any], told: Mapping[str, str], always: set[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries to tell, and what is told with them of all that there are."""
    texts = {name: _text(value) for name, value in now.items()}
    new = {n: v for n, v in now.items() if n in always or told.get(n) != texts[n]}
    return new, texts


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
