"""When the successor of a warm allocation is submitted, so that it starts as the other ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from flwr_hpc.clock import Clock
from flwr_hpc.config.facility import walltime_s
from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.schedulers.base import JobInfo
from flwr_hpc.site.forecast.base import QueueForecast

LEAST_S = 60.0  # for a start-up nobody has measured yet
LEAD_SHARE = 0.75  # of the walltime: a job uses the rest before its successor is submitted
PREPARING_SHARE = 0.25
FRESH_S = 60.0  # a forecast is asked for anew after so long


class Renewal:
    """Says when it is time for a successor.

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

    def is_due(
        self,
        left_s: float | None,
        queued: Sequence[tuple[JobInfo | None, float]],
        ledgers: Iterable[dict[str, float]],
    ) -> bool:
        """Tell whether a site needs one more allocation now, see `next_successor_in_s`.

        Parameters
        ----------
        left_s : float or None
            Walltime left of the running allocation; None: none runs.
        queued : sequence of (JobInfo or None, float)
            Of every allocation in the queue what the scheduler says, and how long it has waited.
        ledgers : iterable of dict
            Seconds of the site's allocations so far, by what they went into.
        """
        config, walltime = self._config, self._walltime
        if len(queued) - (left_s is None) >= config.max_successors:
            return False  # before the forecast is asked for
        if (left_s or 0.0) > LEAD_SHARE * walltime:
            return False
        lead = lead_s(config, walltime, self._wait_s(), preparing_s(ledgers))
        if lead is None or (queued and lead < walltime):
            return False  # one of those in the queue lasts longer than that
        starts = [self._starts_in_s(info, waited_s, lead) for info, waited_s in queued]
        return next_successor_in_s(config, walltime, lead, left_s, starts) == 0.0

    def _starts_in_s(self, info: JobInfo | None, waited_s: float, lead: float) -> float:
        """Return when a job in the queue is expected to start; without a forecast, after `lead`."""
        left = None
        if info is not None:
            left = self._forecast.remaining_s(info, waited_s, self._config.renew_quantile)
        return max(0.0, lead - waited_s) if left is None else left

    def _wait_s(self) -> float | None:
        if self._config.policy != "warm" or self._config.renew_ahead != "forecast":
            return None
        at, wait_s = self._wait
        if self._clock.now() - at >= FRESH_S:
            wait_s = self._forecast.wait_s(self._config.renew_quantile)
            self._wait = self._clock.now(), wait_s
        return wait_s


def preparing_s(ledgers: Iterable[dict[str, float]]) -> float | None:
    """Return the median of what start-up and load took in earlier allocations, in seconds."""
    took = [led["startup"] + led["load"] for led in ledgers if {"startup", "load"} <= led.keys()]
    return median(took) if took else None


def lead_s(
    config: AllocationConfig, walltime: float, wait_s: float | None, preparing: float | None
) -> float | None:
    """Return how long before a site's last job ends the next is submitted; None: never.

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
    if config.policy != "warm" or config.renew_ahead == "off" or config.max_successors < 1:
        return None
    if config.renew_ahead == "forecast":
        # A local or quick job must not spend its walltime on replacing itself.
        ready = min(max(LEAST_S, preparing or 0.0), PREPARING_SHARE * walltime)
        return (wait_s or 0.0) + ready
    return float(walltime_s(config.renew_ahead))


def covered_s(left_s: float | None, starts_in_s: Iterable[float], walltime: float) -> float:
    """Return how long it takes until the last job, of those that run or wait, will end."""
    return max(left_s or 0.0, *(start + walltime for start in starts_in_s), 0.0)


def next_successor_in_s(
    config: AllocationConfig,
    walltime: float,
    lead: float | None,
    left_s: float | None,
    starts_in_s: Sequence[float],
) -> float | None:
    """Return in how many seconds one more allocation is to be submitted; 0: now; None: never.

    One is due when the last job of those that run or wait will end within `lead`. So one
    successor waits at a time where waits are shorter than a walltime, and where they are longer
    as many as it takes to let the next begin when the one before it ends, up to
    ``config.max_successors``. Whatever is forecast, the running job is first used for a quarter
    of its walltime: a wrong forecast must not let jobs do nothing but replace each other.

    Parameters
    ----------
    config : AllocationConfig
    walltime : float
        Of a job, in seconds.
    lead : float or None
        See `lead_s`.
    left_s : float or None
        Walltime left of the running allocation; None: none runs.
    starts_in_s : sequence of float
        Expected seconds until each of the allocations in the queue starts. While none runs, the
        first to start is no successor.
    """
    successors = len(starts_in_s) - (left_s is None)
    if lead is None or successors < 0 or successors >= config.max_successors:
        return None
    used = (left_s or 0.0) - LEAD_SHARE * walltime
    return max(0.0, used, covered_s(left_s, starts_in_s, walltime) - lead)
