"""When the successor of a warm allocation is submitted, so that it starts as the other ends."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Protocol

from flwr_hpc.clock import Clock
from flwr_hpc.config.facility import walltime_s
from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.protocol import Forecast
from flwr_hpc.schedulers.base import JobInfo

LEAST_S = 60.0  # for a start-up nobody has measured yet
LEAD_SHARE = 0.75  # of the walltime: at least the rest of it is used whatever is forecast
PREPARING_SHARE = 0.25
FRESH_S = 60.0  # a forecast is asked for anew after so long


class QueueForecast(Protocol):
    """Knows of waits in one facility's queue, see `flwr_hpc.site.forecast.forecaster`."""

    def wait(self, quantile: float = 0.5) -> float | None:
        """Return how long a job submitted now would wait, in seconds; None: unknown."""

    def remaining(self, info: JobInfo, age_s: float, quantile: float = 0.5) -> float | None:
        """Return how long a job that has waited for `age_s` has still to wait."""

    def forecast(self, quantile: float = 0.9) -> Forecast:
        """Return what a job submitted now would wait."""

    def submitting(self, job: str) -> None:
        """Hear that a job is submitted next."""

    def observe(self, info: JobInfo) -> None:
        """Hear what the scheduler says of a job."""

    def gave_up(self, job: str, waited_s: float) -> None:
        """Hear that a job was cancelled that had waited so long."""


class NoForecast:
    """Knows nothing."""

    def wait(self, quantile: float = 0.5) -> float | None:
        return None

    def remaining(self, info: JobInfo, age_s: float, quantile: float = 0.5) -> float | None:
        return None

    def forecast(self, quantile: float = 0.9) -> Forecast:
        return Forecast(quantile=quantile)

    def submitting(self, job: str) -> None:
        """Forget it."""

    def observe(self, info: JobInfo) -> None:
        """Forget it."""

    def gave_up(self, job: str, waited_s: float) -> None:
        """Forget it."""


class Renewal:
    """Tells when it is time for a successor.

    Parameters
    ----------
    config : AllocationConfig
    walltime : float
        Of a job, in seconds.
    forecast : QueueForecast
    clock : Clock
    """

    def __init__(
        self, config: AllocationConfig, walltime: float, forecast: QueueForecast, clock: Clock
    ) -> None:
        self._config, self._walltime = config, walltime
        self._forecast, self._clock = forecast, clock
        self._wait: tuple[float, float | None] = (float("-inf"), None)

    def due(self, left_s: float, ledgers: Iterable[dict[str, float]]) -> bool:
        """Tell whether an allocation with so much walltime left needs a successor now."""
        if left_s > LEAD_SHARE * self._walltime:
            return False  # before the forecast is asked for
        lead = lead_s(self._config, self._walltime, self._wait_s(), preparing_s(ledgers))
        return lead is not None and left_s <= lead

    def _wait_s(self) -> float | None:
        if self._config.policy != "warm" or self._config.renew_ahead != "forecast":
            return None
        at, wait_s = self._wait
        if self._clock.now() - at >= FRESH_S:
            wait_s = self._forecast.wait(self._config.renew_quantile)
            self._wait = self._clock.now(), wait_s
        return wait_s


def preparing_s(ledgers: Iterable[dict[str, float]]) -> float | None:
    """Return the median of what start-up and load took in earlier allocations, in seconds."""
    took = [led["startup"] + led["load"] for led in ledgers if {"startup", "load"} <= led.keys()]
    return median(took) if took else None


def lead_s(
    config: AllocationConfig, walltime: float, wait_s: float | None, preparing: float | None
) -> float | None:
    """Return how long before an allocation's end its successor is submitted; None: never.

    Parameters
    ----------
    config : AllocationConfig
    walltime : float
        Of a job, in seconds.
    wait_s : float or None
        Forecast of the wait in the queue.
    preparing : float or None
        Seconds from a job's start until it is ready, as far as known.
    """
    if config.policy != "warm" or config.renew_ahead == "off":
        return None
    if config.renew_ahead == "forecast":
        # A local or quick job must not spend its walltime on replacing itself.
        ready = min(max(LEAST_S, preparing or 0.0), PREPARING_SHARE * walltime)
        lead = (wait_s or 0.0) + ready
    else:
        lead = float(walltime_s(config.renew_ahead))
    return min(lead, LEAD_SHARE * walltime)
