"""What a site answers: its state, and what is known of its allocations and jobs."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from flwr_hpc.clock import Clock
from flwr_hpc.protocol import Result, SiteState, Status
from flwr_hpc.site.job_times import Span, alone_s, queue_s, spans, times
from flwr_hpc.site.monitor import Monitor, View, is_gone
from flwr_hpc.site.renewal import QueueForecast
from flwr_hpc.spool import AllocationDir, Spool

PROGRESS = ("step", "steps", "loss", "tokens_per_s")
HIGH = 0.9  # quantile of the forecast beside the median
FRESH_S = 30.0  # a forecast is computed anew after so long


class Account(NamedTuple):
    """What an allocation cost."""

    ledger: dict[str, float]  # Seconds by what they went into
    job: dict[str, Any]  # See `Status.jobs`
    waits: list[Span]  # When its job was in the queue, and when it ran: the scheduler's time
    runs: list[Span]


class Answers:
    """Puts a site's answers together.

    Parameters
    ----------
    spool : Spool
    facility_name : str
    watch : Monitor
    forecast : QueueForecast
    clock : Clock
    """

    def __init__(
        self,
        spool: Spool,
        facility_name: str,
        watch: Monitor,
        forecast: QueueForecast,
        clock: Clock,
    ) -> None:
        self._spool, self._facility, self._watch = spool, facility_name, watch
        self._forecast, self._clock = forecast, clock
        self._final: dict[str, Account] = {}
        self._waits: dict[str, tuple[float, dict[str, float | None]]] = {}

    def say(self, state: SiteState, **fields: Any) -> Status:
        """Answer with a state; the rest is filled in."""
        self._watch.settle()
        known = {a.name: self.known(a) for a in self._spool.allocations()}
        return dataclasses.replace(
            Status(
                state,
                facility=self._facility,
                ledger={name: account.ledger for name, account in known.items()},
                jobs={name: account.job for name, account in known.items() if account.job},
                queued_s=alone_s(
                    (span for account in known.values() for span in account.waits),
                    (span for account in known.values() for span in account.runs),
                ),
            ),
            **fields,
        )

    def finished(self, result: Result, next_up: tuple[AllocationDir, View] | None) -> Status:
        """Answer with an order's result, and where the next order could go at once."""
        return self.say(
            result.state,
            order_id=result.order_id,
            allocation=next_up[0].name if next_up else "",
            walltime_left_s=next_up[1].walltime_left_s if next_up else None,
            result=result,
            steps=result.steps,
            error=result.error,
            fatal=result.fatal,
        )

    def of(self, alloc: AllocationDir, view: View, order_id: str = "") -> Status:
        """Answer with the state of a living allocation, or of an order it has."""
        assert view.state != "ended"
        state: SiteState = view.state
        progress: dict[str, Any] = {}
        if order_id and state == "ready":
            state = "running"
            written = self._spool.order(order_id).progress()
            progress = {k: v for k, v in written.items() if k in PROGRESS}
        return self.say(
            state,
            order_id=order_id,
            allocation=alloc.name,
            walltime_left_s=view.walltime_left_s,
            reason=view.reason if state == "queued" else "",
            **(self._wait(alloc, view) if state == "queued" else {}),
            **progress,
        )

    def known(self, alloc: AllocationDir) -> Account:
        """Return what an allocation has cost so far."""
        found = self._final.get(alloc.name)
        if found is None:
            found = self._account(alloc)
            if self._watch.is_closed(alloc) and (is_gone(alloc) or alloc.job() is None):
                self._final[alloc.name] = found  # nothing of it changes any more
        return found

    def _account(self, alloc: AllocationDir) -> Account:
        job, worker, kept, now = alloc.job(), alloc.state(), times(alloc), self._clock.wall()
        seconds, queued = worker.seconds if worker else {}, queue_s(kept)
        waits, runs = spans(kept, now)
        if runs and is_gone(alloc):  # an end that the scheduler has not told: the worker's
            waits, runs = spans(kept, min(now, runs[-1][0] + sum(seconds.values())))
        if job is not None and not self._watch.is_closed(alloc):
            info = self._watch.info(alloc, job)
            age = self._watch.waited_s(job, info) if info.state == "pending" else 0.0
            queued, waits = queued + age, [*waits, (now - age, now)]
        return Account({"queue": queued, **seconds}, _job(alloc), waits, runs)

    def _wait(self, alloc: AllocationDir, view: View) -> dict[str, float | None]:
        """Return the forecast of what a queued allocation has still to wait."""
        job, info = alloc.job(), view.info
        if job is None or info is None:
            return {}
        at, found = self._waits.get(alloc.name, (float("-inf"), {}))
        if self._clock.now() - at >= FRESH_S:
            age = self._watch.waited_s(job, info)
            found = {
                "queue_wait_s": self._forecast.remaining(info, age),
                "queue_wait_high_s": self._forecast.remaining(info, age, HIGH),
            }
            self._waits[alloc.name] = self._clock.now(), found
        return found


def _job(alloc: AllocationDir) -> dict[str, Any]:
    """Return what is known of the allocation's job, see `Status.jobs`."""
    job, kept = alloc.job(), times(alloc)
    if job is None:
        return {}
    stays = kept.get("stays") or [{}]
    facts = {key: kept.get(key) for key in ("nodes", "restarts", "outcome")}
    facts |= {"id": job["id"], "submitted_s": job["submitted_s"]}
    facts |= {key: value for key, value in stays[-1].items() if value is not None}
    if len(stays) > 1:
        facts["stays"] = stays
    return {key: value for key, value in facts.items() if value is not None}
