"""How long a job will wait in the queue: forecast, and recorded to be scored later."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from flwr_hpc.clock import Clock
from flwr_hpc.errors import UserError
from flwr_hpc.files import lock, publish, read_json
from flwr_hpc.protocol import Forecast
from flwr_hpc.schedulers.base import JobInfo, JobSpec, Scheduler, SchedulerUnavailableError
from flwr_hpc.site.forecast.estimate import HIGH, Estimate, estimate
from flwr_hpc.site.forecast.history import History, Wait, shape_of
from flwr_hpc.site.forecast.score import score_forecasts
from flwr_hpc.site.forecast.survival import Survival

PLAN_POLLS = 10  # the scheduler is asked for a plan at most every so many polling intervals
AT_ONCE = Survival(np.array([0.0, 1e-9]), np.array([1.0, 0.0]))

log = logging.getLogger(__name__)


class Forecaster:
    """One facility's forecasts, and the record of them; several processes may hold one.

    A job is recorded by name: `record_submission`, then `record_info` whenever the scheduler
    answered, and `record_cancellation`. Each may be called again, or never.

    Parameters
    ----------
    facility_name : str
    spec : JobSpec
        Such a job is forecast.
    scheduler : Scheduler
        Asked for its plan, seldom.
    clock : Clock
    folder : Path or None
        Where the history lies; default: the user's own, see `flwr_hpc.site.forecast.history`.
    """

    def __init__(
        self,
        facility_name: str,
        spec: JobSpec,
        scheduler: Scheduler,
        clock: Clock,
        folder: Path | None = None,
    ) -> None:
        self.history = History(facility_name, folder)
        self._spec, self._scheduler, self._clock = spec, scheduler, clock
        self._facility, self._shape = spec.facility, shape_of(spec.facility)
        self._plans = self.history.path.with_suffix(".plans.json")
        self._key = json.dumps(asdict(self._shape))
        self._floor_s = max(1.0, spec.facility.poll_s)  # schedulers' times are whole seconds
        self._ask_every_s = PLAN_POLLS * spec.facility.poll_s

    def wait_s(self, quantile: float = 0.5) -> float | None:
        """Return how long a job submitted now would wait, in seconds; None: nothing is known."""
        return self._new().quantile(quantile)

    def remaining_s(self, info: JobInfo, age_s: float, quantile: float = 0.5) -> float | None:
        """Return how long a job that has waited for `age_s` has still to wait; asks nobody."""
        others = [wait for wait in self.history.waits() if wait.job != info.name]
        left = None
        if info.expected_start_s is not None:
            left = max(0.0, info.expected_start_s - self._clock.wall())
        return self._estimate(others, left, max(0.0, age_s)).quantile(quantile)

    def forecast(self, quantile: float = HIGH) -> Forecast:
        """Return what a job submitted now would wait, and what such forecasts were worth."""
        waits, now = self.history.waits(), self._new()
        score = score_forecasts(waits, quantile)
        return Forecast(
            median_s=now.quantile(0.5),
            high_s=now.quantile(quantile),
            quantile=quantile,
            source=now.source,
            waits=sum(wait.over and not wait.void for wait in waits),
            checked=score.checked,
            error_s=score.error_s,
            coverage=score.coverage,
        )

    def record_submission(self, job: str) -> None:
        """Note what is forecast for a job that is submitted next."""
        recorded = {wait.job for wait in self.history.waits()}
        if not self._queues or job in recorded:
            return
        self.history.note(
            job,
            submitted_s=self._clock.wall(),
            scheduler=self._facility.scheduler,
            **asdict(self._shape),
            **self._new().record(),
        )

    def record_info(self, info: JobInfo) -> None:
        """Note what the scheduler says of a job's wait, where that is news."""
        recorded = {w.job: w for w in self.history.waits()} if self._queues else {}
        wait = recorded.get(info.name)
        if wait is None or wait.closed or info.state == "unknown":
            return
        if info.stuck or info.restarts:  # a job that was put back waits for other reasons too
            self.history.note(info.name, void=True, closed=True)
        elif info.queue_s is not None:
            self.history.note(info.name, waited_s=info.queue_s, over=_ran(info), closed=True)
        elif info.state == "ended":
            self.history.note(info.name, closed=True)
        else:
            self._pending(info, wait)

    def record_cancellation(self, job: str, waited_s: float) -> None:
        """Note that a job was cancelled after it had waited for so long."""
        if any(wait.job == job and not wait.closed for wait in self.history.waits()):
            self.history.note(job, waited_s=max(0.0, waited_s), closed=True)

    def _pending(self, info: JobInfo, wait: Wait) -> None:
        began = wait.submitted_s if info.submitted_s is None else info.submitted_s
        news: dict[str, Any] = {}
        age = max(0.0, self._clock.wall() - began)
        if age > 1.2 * (wait.waited_s or 0.0) + self._facility.poll_s:
            news["waited_s"] = age
        if wait.plan_s is None and info.expected_start_s is not None:
            news["plan_s"] = max(0.0, info.expected_start_s - began)
        if news:
            self.history.note(info.name, **news)

    @property
    def _queues(self) -> bool:
        return not self._facility.local  # which starts at once: nothing to learn

    def _new(self) -> Estimate:
        if not self._queues:
            return Estimate(None, AT_ONCE, 0.0, 1.0, self._floor_s)
        return self._estimate(self.history.waits(), self._plan(), None)

    def _estimate(
        self, waits: Sequence[Wait], plan_s: float | None, age_s: float | None
    ) -> Estimate:
        return estimate(waits, self._shape, self._clock.wall(), self._floor_s, plan_s, age_s)

    def _plan(self) -> float | None:
        """Return the scheduler's plan for a new job, from a file unless that is old."""
        now = self._clock.wall()
        try:
            with lock(self.history.folder):
                last = self._kept_plans().get(self._key, {})
                if 0 <= now - last.get("asked", float("-inf")) < self._ask_every_s:
                    return cast("float | None", last["wait_s"])
                # Whoever comes meanwhile, or after this was killed, makes do with the last one.
                self._keep_plan(now, last.get("wait_s"))
            wait_s = self._ask()
            with lock(self.history.folder):
                self._keep_plan(now, wait_s)
            return wait_s
        except OSError as exc:  # nowhere to note that it was asked: do without
            log.warning("the scheduler's plan is left out: %s", exc)
            return None

    def _ask(self) -> float | None:
        try:
            return self._scheduler.estimate(self._spec)
        except (SchedulerUnavailableError, UserError):  # a refusal is for whoever submits
            return None

    def _keep_plan(self, asked: float, wait_s: float | None) -> None:
        plans = {**self._kept_plans(), self._key: {"asked": asked, "wait_s": wait_s}}
        publish(self._plans, json.dumps(plans))

    def _kept_plans(self) -> dict[str, Any]:
        try:
            return read_json(self._plans) or {}
        except ValueError:  # not ours: it is written whole or not at all
            return {}


def _ran(info: JobInfo) -> bool:
    """Tell whether a job with a start did start: Slurm gives one that was cancelled its end."""
    return info.outcome != "cancelled" or info.started_s != info.ended_s
