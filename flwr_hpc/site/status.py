"""What a site answers: its state, and what its allocations and jobs have cost."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from flwr_hpc.clock import Clock
from flwr_hpc.protocol import Result, SiteState, Status
from flwr_hpc.site.forecast.base import QueueForecast
from flwr_hpc.site.monitoring.job_times import Span, total_s, waiting_s, waits_and_runs
from flwr_hpc.site.monitoring.monitor import Monitor, View
from flwr_hpc.spool import AllocationDir, JobTimes, Spool

PROGRESS = ("step", "steps", "loss", "tokens_per_s", "note")
HIGH = 0.9  # quantile of the forecast beside the median
FRESH_S = 30.0  # a forecast is computed anew after so long


class Account(NamedTuple):
    """What an allocation cost."""

    ledger: dict[str, float]  # Seconds by what they went into
    job: dict[str, Any]  # See `Status.jobs`
    waits: list[Span]  # When its job was in the queue, and when it ran: the scheduler's time
    runs: list[Span]


class StatusBuilder:
    """Puts a site's answers together.

    Parameters
    ----------
    spool : Spool
    facility_name : str
    monitor : Monitor
    forecast : QueueForecast
    clock : Clock
    """

    def __init__(
        self,
        spool: Spool,
        facility_name: str,
        monitor: Monitor,
        forecast: QueueForecast,
        clock: Clock,
    ) -> None:
        self._spool, self._facility, self._monitor = spool, facility_name, monitor
        self._forecast, self._clock = forecast, clock
        self._final: dict[str, Account] = {}
        self._waits: dict[str, tuple[float, dict[str, float | None]]] = {}

    def of_state(self, state: SiteState, **fields: Any) -> Status:
        """Answer with a state; the rest is filled in."""
        self._monitor.record_ends()
        accounts = {a.name: self.account(a) for a in self._spool.allocations()}
        return dataclasses.replace(
            Status(
                state,
                facility=self._facility,
                ledger={name: account.ledger for name, account in accounts.items()},
                jobs={name: account.job for name, account in accounts.items() if account.job},
                queued_s=waiting_s(
                    (span for account in accounts.values() for span in account.waits),
                    (span for account in accounts.values() for span in account.runs),
                ),
            ),
            **fields,
        )

    def of_result(self, result: Result, next_up: tuple[AllocationDir, View] | None) -> Status:
        """Answer with an order's result, and where the next order could go at once."""
        return self.of_state(
            result.state,
            order_id=result.order_id,
            allocation=next_up[0].name if next_up else "",
            walltime_left_s=next_up[1].walltime_left_s if next_up else None,
            result=result,
            steps=result.steps,
            error=result.error,
            fatal=result.fatal,
        )

    def of_allocation(self, alloc: AllocationDir, view: View, order_id: str = "") -> Status:
        """Answer with the state of a living allocation, or of an order it has."""
        assert view.state != "ended"
        state: SiteState = view.state
        progress: dict[str, Any] = {}
        if order_id and state == "ready":
            state = "running"
            written = self._spool.order(order_id).progress()
            progress = {k: v for k, v in written.items() if k in PROGRESS}
        return self.of_state(
            state,
            order_id=order_id,
            allocation=alloc.name,
            walltime_left_s=view.walltime_left_s,
            reason=view.reason if state == "queued" else "",
            **(self._forecast_wait(alloc, view) if state == "queued" else {}),
            **progress,
        )

    def account(self, alloc: AllocationDir) -> Account:
        """Return what an allocation has cost so far."""
        account = self._final.get(alloc.name)
        if account is None:
            account = self._account(alloc)
            if self._monitor.is_closed(alloc) and (alloc.has_job_ended or alloc.job() is None):
                self._final[alloc.name] = account  # nothing of it changes any more
        return account

    def _account(self, alloc: AllocationDir) -> Account:
        job, worker, now = alloc.job(), alloc.state(), self._clock.wall()
        times = alloc.times.read() or JobTimes("")
        seconds = worker.seconds if worker else {}
        waits, runs = waits_and_runs(times.cycles, now)
        if runs and alloc.has_job_ended:  # an end that the scheduler has not told: the worker's
            end = min(now, runs[-1][0] + sum(seconds.values()))
            waits, runs = waits_and_runs(times.cycles, end)
        if job is not None and not self._monitor.is_closed(alloc):
            info = self._monitor.job_info(alloc, job)
            if info.state == "pending":
                waits = [*waits, (now - self._monitor.waited_s(job, info), now)]
        facts = {} if job is None else _job_facts(job, times)
        return Account({"queue": total_s(waits), **seconds}, facts, waits, runs)

    def _forecast_wait(self, alloc: AllocationDir, view: View) -> dict[str, float | None]:
        """Return the forecast of what a queued allocation has still to wait."""
        job, info = alloc.job(), view.info
        if job is None or info is None:
            return {}
        computed, waits = self._waits.get(alloc.name, (float("-inf"), {}))
        if self._clock.now() - computed >= FRESH_S:
            age = self._monitor.waited_s(job, info)
            waits = {
                "queue_wait_s": self._forecast.remaining_s(info, age),
                "queue_wait_high_s": self._forecast.remaining_s(info, age, HIGH),
            }
            self._waits[alloc.name] = self._clock.now(), waits
        return waits


def _job_facts(job: dict[str, Any], times: JobTimes) -> dict[str, Any]:
    """Return what is known of an allocation's job, see `Status.jobs`."""
    facts: dict[str, Any] = {"nodes": times.nodes, "outcome": times.outcome}
    if times.id:
        facts["restarts"] = times.restarts
    facts |= {"id": job["id"], "submitted_s": job["submitted_s"]}
    cycles = [dataclasses.asdict(cycle) for cycle in times.cycles]
    if cycles:
        facts |= {key: value for key, value in cycles[-1].items() if value is not None}
    if len(cycles) > 1:
        facts["cycles"] = cycles
    return {key: value for key, value in facts.items() if value is not None}
