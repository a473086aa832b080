"""The engine's lines in the event log."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr_hpc.protocol import WEIGHT_KEY, Order, Status
from strategies.sites import Site, Work

__all__ = ["Telemetry"]

# What the state of a site says of its allocation.
ALLOCATION_STATES = {
    "queued": "queued",
    "starting": "starting",
    "ready": "ready",
    "running": "ready",
    "done": "ready",
    "idle": "ended",
}


class Telemetry:
    """Turns what happens to orders and allocations into events."""

    def __init__(self, emit: Callable[..., object]) -> None:
        self._emit = emit

    def sent(self, order: Order, attempt: int) -> None:
        """Tell that an order was handed in."""
        self._emit(
            "order_sent",
            facility=order.facility,
            order_id=order.id,
            kind=order.kind,
            version=order.version,
            steps=order.steps,
            attempt=attempt,
        )

    def progress(self, work: Work, status: Status) -> None:
        """Tell how far a running order is, if it has moved."""
        if status.state != "running" or status.step <= work.step:
            return
        work.step = status.step
        self._emit(
            "order_progress",
            facility=work.facility,
            order_id=work.order_id,
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
            ledger=status.ledger if status else {},
            round_trip_s=round_trip_s,
        )

    def rejected(self, order: Order, reason: str) -> None:
        """Tell of weights that must not touch the model."""
        self._emit("order_rejected", facility=order.facility, order_id=order.id, reason=reason)

    def failed(self, work: Work, reason: str, *, fatal: bool = False) -> None:
        """Tell of a failed attempt."""
        self._emit(
            "order_failed",
            facility=work.facility,
            order_id=work.order_id,
            reason=reason,
            fatal=fatal,
            attempt=work.attempts,
        )

    def evaluated(self, order: Order, loss: float) -> None:
        """Tell the held-out loss of a version at a facility."""
        self._emit("evaluated", facility=order.facility, version=order.version, held_out_loss=loss)

    def allocation(self, site: Site, status: Status) -> None:
        """Note the state of a site's allocation, and tell when it changes."""
        state = ALLOCATION_STATES.get(status.state)
        name = site.allocation if status.state == "idle" else status.allocation
        site.walltime_left_s = status.walltime_left_s
        if state is None or not name or (name, state) == (site.allocation, site.allocation_state):
            return
        if site.allocation not in ("", name) and site.allocation_state != "ended":
            self._allocation(site.facility, site.allocation, "ended", None)
        site.allocation, site.allocation_state = name, state
        self._allocation(site.facility, name, state, status)

    def _allocation(self, facility: str, name: str, state: str, status: Status | None) -> None:
        self._emit(
            "allocation",
            facility=facility,
            allocation=name,
            state=state,
            queue_wait_s=status.queue_wait_s if status else None,
            walltime_left_s=status.walltime_left_s if status else None,
        )
