"""What the launcher asks of a forecast of the queue, and tells it."""

from __future__ import annotations

from typing import Protocol

from flwr_hpc.protocol import Forecast
from flwr_hpc.schedulers.base import JobInfo


class QueueForecast(Protocol):
    """Forecasts the waits in one facility's queue, see `flwr_hpc.site.forecast.forecaster`."""

    def wait_s(self, quantile: float = 0.5) -> float | None:
        """Return how long a job submitted now would wait, in seconds; None: unknown."""

    def remaining_s(self, info: JobInfo, age_s: float, quantile: float = 0.5) -> float | None:
        """Return how long a job that has waited for `age_s` has still to wait."""

    def forecast(self, quantile: float = 0.9) -> Forecast:
        """Return what a job submitted now would wait."""

    def record_submission(self, job: str) -> None:
        """Learn that a job is submitted next."""

    def record_info(self, info: JobInfo) -> None:
        """Learn what the scheduler says of a job."""

    def record_cancellation(self, job: str, waited_s: float) -> None:
        """Learn that a job was cancelled that had waited so long."""


class NoForecast:
    """Knows nothing."""

    def wait_s(self, quantile: float = 0.5) -> float | None:
        return None

    def remaining_s(self, info: JobInfo, age_s: float, quantile: float = 0.5) -> float | None:
        return None

    def forecast(self, quantile: float = 0.9) -> Forecast:
        return Forecast(quantile=quantile)

    def record_submission(self, job: str) -> None:
        """Forget it."""

    def record_info(self, info: JobInfo) -> None:
        """Forget it."""

    def record_cancellation(self, job: str, waited_s: float) -> None:
        """Forget it."""
