"""What past waits and the scheduler's plan say of a wait. Pure functions.

Two sources, each a distribution: the waits of similar jobs (`by_history`), and the scheduler's
plan, corrected by how earlier plans turned out (`by_plan`). Their quantiles are averaged on a
log scale, by how well each has done lately, and the upper ones stretched so that they would have
held as often as they should. Waits are compared above a floor, one polling interval: what is
shorter than that makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.site.forecast.history import Shape, Wait
from flwr_hpc.site.forecast.survival import Floats, Survival, survival

HALF_JOBS = 8.0  # a wait counts half after so many younger ones of its kind
HALF_S = 14 * 86400.0  # or after two weeks
OTHER_QUEUE = 1 / 16  # what a wait in another partition or QOS counts
HIGH = 0.9  # the upper quantile that is recorded
STRETCH_AFTER = 10  # waits


@dataclass(frozen=True)
class Estimate:
    """What is known of a wait."""

    history: Survival | None  # Of waits + `floor_s`
    planned: Survival | None  # Of what is still to wait + `floor_s`, given `plan_s`
    plan_s: float | None  # The scheduler's plan of what is still to wait
    trust: float  # Weight of the plan against the history, 0 to 1
    floor_s: float
    # How long the job has waited; None for one that is not submitted yet.
    age_s: float | None = None
    stretch: float = 1.0  # Of the `HIGH` quantile; see `stretch`

    @property
    def source(self) -> str:
        """Return what it is made of, in `Forecast`'s words."""
        if self.history is not None and self.planned is not None:
            return "both"
        sources = {"history": self.history, "scheduler": self.planned}
        return next((name for name, value in sources.items() if value is not None), "none")

    def quantile(self, q: float) -> float | None:
        """Return the `q` quantile of the seconds still to wait; None if nothing is known."""
        raw, middle = self.unstretched(q), self.unstretched(0.5)
        if raw is None or middle is None or q <= 0.5:
            return raw
        by = float(self.stretch ** min(1.0, (q - 0.5) / (HIGH - 0.5)))
        return max(middle, (raw + self.floor_s) * by - self.floor_s)

    def unstretched(self, q: float) -> float | None:
        """Return `quantile` before the record of earlier ones has corrected it."""
        past, plan = self.of_history(q), self.of_plan(q)
        if past is None or plan is None:
            return plan if past is None else past
        logs = np.log([past + self.floor_s, plan + self.floor_s])
        mean = float(np.exp((1 - self.trust) * logs[0] + self.trust * logs[1]))
        return max(0.0, mean - self.floor_s)

    def of_history(self, q: float) -> float | None:
        """Return what the history alone would say."""
        if self.history is None:
            return None
        waited = 0.0 if self.age_s is None else self.age_s + self.floor_s
        whole = self.history.quantile(q, waited)
        return max(0.0, whole - self.floor_s - (self.age_s or 0.0))

    def of_plan(self, q: float) -> float | None:
        """Return what the scheduler's plan alone would say, corrected."""
        if self.planned is None:
            return None
        return max(0.0, self.planned.quantile(q) - self.floor_s)

    def record(self) -> dict[str, Any]:
        """Return what is kept of it, in `Wait`'s fields."""
        return {
            "plan_s": self.plan_s,
            "median_s": self.quantile(0.5),
            "high_s": self.quantile(HIGH),
            "quantile": HIGH,
            "source": self.source,
            "unstretched_s": self.unstretched(HIGH),
            "by_history_s": self.of_history(0.5),
            "by_plan_s": self.of_plan(0.5),
        }


def estimate(
    waits: Sequence[Wait],
    shape: Shape,
    now: float,
    floor_s: float,
    plan_s: float | None = None,
    age_s: float | None = None,
) -> Estimate:
    """Bring together what is known of a job's wait.

    Parameters
    ----------
    waits : sequence of Wait
        Of other jobs, oldest first.
    shape : Shape
    now : float
        Unix seconds.
    floor_s : float
    plan_s : float or None
        The scheduler's plan of what is still to wait, if it has one.
    age_s : float or None
        How long the job has waited; None for one that would be submitted now.
    """
    conditions = (shape, now, floor_s)
    return Estimate(
        history=by_history(waits, *conditions),
        planned=None if plan_s is None else by_plan(waits, plan_s, *conditions),
        plan_s=plan_s,
        trust=trust(waits, *conditions),
        floor_s=floor_s,
        age_s=age_s,
        stretch=stretch(waits, floor_s) if age_s is None else 1.0,
    )


def similarity(waits: Sequence[Wait], shape: Shape, now: float) -> Floats:
    """Return how much each wait, oldest first, tells of a job of this shape submitted now.

    A factor of two in nodes x walltime halves it, and so do 8 younger waits of its kind.
    """
    like = np.array([_alike(wait.shape, shape) for wait in waits], dtype=np.float64)
    younger = np.cumsum(like[::-1])[::-1] - like
    age = np.array([max(0.0, now - wait.submitted_s) for wait in waits], dtype=np.float64)
    return np.asarray(like * 0.5 ** (younger / HALF_JOBS + age / HALF_S), dtype=np.float64)


def _alike(a: Shape, b: Shape) -> float:
    sizes = [max(1.0, s.nodes * s.walltime_s) for s in (a, b)]
    queue = 1.0 if (a.partition, a.qos) == (b.partition, b.qos) else OTHER_QUEUE
    return queue * min(sizes) / max(sizes)


def by_history(waits: Sequence[Wait], shape: Shape, now: float, floor_s: float) -> Survival | None:
    """Estimate the distribution of waits + `floor_s`."""
    usable = [wait for wait in waits if wait.waited_s is not None and not wait.void]
    times = np.array([wait.waited_s for wait in usable], dtype=np.float64) + floor_s
    return survival(times, _over(usable), similarity(usable, shape, now))


def by_plan(
    waits: Sequence[Wait], plan_s: float, shape: Shape, now: float, floor_s: float
) -> Survival:
    """Estimate the distribution of waits + `floor_s`, given the scheduler's plan.

    Earlier waits are taken as they would have been with this plan: wait ~ plan ** slope. Plans of
    another length tell less: half when eight times as long. A scheduler without a record is
    taken at its word.
    """
    usable = [wait for wait in waits if wait.waited_s is not None and not wait.void]
    usable = [wait for wait in usable if wait.plan_s is not None]
    times = np.array([wait.waited_s for wait in usable], dtype=np.float64) + floor_s
    plans = np.array([wait.plan_s for wait in usable], dtype=np.float64) + floor_s
    over, like = _over(usable), similarity(usable, shape, now)
    off = np.log((plan_s + floor_s) / plans)
    times = times * np.exp(_slope(-off[over], np.log(times[over]), like[over]) * off)
    curve = survival(times, over, like * np.exp(-np.abs(off) / 3.0))
    return curve or Survival(np.array([0.0, plan_s + floor_s]), np.array([1.0, 0.5]))


def _slope(x: Floats, y: Floats, weights: Floats) -> float:
    """Return the slope of y over x, 0 to 1; it is 1 as long as nothing speaks against it."""
    total = max(float(weights.sum()), 1e-9)
    dx, dy = x - float(weights @ x) / total, y - float(weights @ y) / total
    slope = (float(weights @ (dx * dy)) + 1.0) / (float(weights @ (dx * dx)) + 1.0)
    return min(1.0, max(0.0, slope))


def _over(waits: Sequence[Wait]) -> NDArray[np.bool_]:
    return np.array([wait.over for wait in waits], dtype=np.bool_)


def trust(waits: Sequence[Wait], shape: Shape, now: float, floor_s: float) -> float:
    """Return the weight of the plan against the history: by their mean squared log errors."""
    usable = [w for w in waits if w.over and not w.void]
    usable = [w for w in usable if w.by_history_s is not None and w.by_plan_s is not None]
    weights = similarity(usable, shape, now)
    real = np.log([(w.waited_s or 0.0) + floor_s for w in usable])
    errors = []
    for medians in ([w.by_history_s or 0.0 for w in usable], [w.by_plan_s or 0.0 for w in usable]):
        off = (np.log(np.array(medians) + floor_s) - real) ** 2
        errors.append(float(weights @ off) + 1.0)  # as if each had been off once, by a factor e
    return errors[0] / sum(errors)


def stretch(waits: Sequence[Wait], floor_s: float) -> float:
    """Return the factor that would have made the recorded upper quantiles hold as often as meant.

    That is the same quantile of the ratios of real wait to forecast: conformalized quantile
    regression (Romano et al. 2019) on a log scale, of which the younger waits count more.
    """
    usable = [w for w in waits if w.waited_s is not None and not w.void]
    usable = [w for w in usable if w.unstretched_s is not None]
    if len(usable) < STRETCH_AFTER:
        return 1.0
    real = np.array([w.waited_s for w in usable], dtype=np.float64) + floor_s
    high = np.array([w.unstretched_s for w in usable], dtype=np.float64) + floor_s
    younger = np.arange(len(usable), dtype=np.float64)[::-1]
    ratios = survival(real / high, _over(usable), 0.5 ** (younger / (3 * HALF_JOBS)))
    return 1.0 if ratios is None else ratios.quantile(HIGH)
