"""Forecasts of the wait in a queue, on made-up waits and a made-up scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.clock import FakeClock

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import JobInfo, JobSpec, SchedulerUnavailableError
from flwr_hpc.site.forecast.estimate import by_history, by_plan, estimate
from flwr_hpc.site.forecast.forecaster import Forecaster
from flwr_hpc.site.forecast.history import Shape, Wait
from flwr_hpc.site.forecast.score import score_forecasts
from flwr_hpc.site.forecast.survival import survival

SHAPE = Shape(2, 3600.0, "gpu")
HOUR = 3600.0


class Scheduler:
    """Plans what it is told to."""

    poll_s = 30.0

    def __init__(self, plan: float | Exception | None = None) -> None:
        self.plan, self.asked = plan, 0

    def estimate(self, spec: JobSpec) -> float | None:
        self.asked += 1
        if isinstance(self.plan, Exception):
            raise self.plan
        return self.plan


def forecaster(
    folder: Path, clock: FakeClock, scheduler: Any = None, kind: str = "slurm"
) -> Forecaster:
    facility = FacilityConfig(
        scheduler=kind, account=None, nodes=2, walltime="01:00:00", partition="gpu"
    )
    spec = JobSpec("new", folder / "job", facility, print)
    return Forecaster("site", spec, scheduler or Scheduler(), clock, folder)


def wait_out(forecast: Forecaster, clock: FakeClock, job: str, waited_s: float) -> None:
    """Submit a job that starts after so long."""
    forecast.record_submission(job)
    began = clock.wall()
    clock.sleep(waited_s)
    forecast.record_info(JobInfo("1", job, "running", submitted_s=began, started_s=clock.wall()))


def waits(values: list[float], over: bool = True, shape: Shape = SHAPE) -> list[Wait]:
    return [
        Wait(
            f"j{k}", 1e9 + k, shape.nodes, shape.walltime_s, shape.partition,
            waited_s=value, over=over,
        )
        for k, value in enumerate(values)
    ]  # fmt: skip


def trace(seed: int, n: int, center_s: float = HOUR) -> list[float]:
    """Return lognormal waits, each related to the one before."""
    rng, z, found = np.random.default_rng(seed), 0.0, []
    for _ in range(n):
        z = 0.5 * z + np.sqrt(0.75) * rng.normal()
        found.append(float(center_s * np.exp(1.2 * z)))
    return found


def test_nothing_is_known_at_first(tmp_path: Path) -> None:
    """Protects the cold start: no number is made up."""
    forecast = forecaster(tmp_path, FakeClock(1e9))
    assert forecast.wait_s() is None
    assert forecast.remaining_s(JobInfo("1", "j", "pending"), 100.0) is None
    told = forecast.forecast()
    assert (told.median_s, told.high_s, told.source, told.checked) == (None, None, "none", 0)


def test_without_a_record_the_schedulers_plan_is_taken_at_its_word(tmp_path: Path) -> None:
    """Protects the first forecast at a facility."""
    told = forecaster(tmp_path, FakeClock(1e9), Scheduler(600.0)).forecast()
    assert told.median_s == pytest.approx(600.0)
    assert told.high_s is not None
    assert told.high_s > 1200.0
    assert told.source == "scheduler"


def test_a_local_job_waits_for_nothing(tmp_path: Path) -> None:
    """Protects the demo from a history in the user's home and from a wait that is none."""
    forecast = forecaster(tmp_path / "new", FakeClock(1e9), Scheduler(0.0), "local")
    forecast.record_submission("j")
    assert (forecast.forecast().median_s, forecast.forecast().high_s) == (0.0, 0.0)
    assert not (tmp_path / "new").exists()


def live_through(real: list[float], plans: Sequence[float | None]) -> list[Wait]:
    """Return the record of jobs submitted one after the other."""
    known: list[Wait] = []
    for k, (waited, plan) in enumerate(zip(real, plans, strict=True)):
        told = estimate(known[-300:], SHAPE, 1e9 + k * HOUR, 30.0, plan)
        job = Wait(f"j{k}", 1e9 + k * HOUR, SHAPE.nodes, SHAPE.walltime_s, SHAPE.partition)
        known.append(replace(job, waited_s=waited, over=True, closed=True, **told.record()))
    return known


@pytest.mark.parametrize("kind", ["none", "good", "biased", "noise"])
def test_the_upper_quantile_holds_as_often_as_meant(kind: str) -> None:
    """Protects the meaning of `high_s` in 500 waits, whatever the scheduler's plans are worth."""
    real = np.array(trace(1, 530))
    off = np.exp(np.random.default_rng(7).normal(size=530))
    plans = {"good": real * off**0.3, "biased": 4 * real * off**0.3, "noise": HOUR * off}
    later = live_through([*real], [*plans[kind]] if kind in plans else [None] * 530)[30:]
    checked, error, coverage = score_forecasts(later, 0.9)
    assert checked == 500
    assert coverage is not None
    assert 0.85 <= coverage <= 0.95
    assert error is not None
    alone = np.median([abs((w.waited_s or 0) - (w.by_history_s or 0)) for w in later])
    assert error < (0.6 if kind in ("good", "biased") else 1.2) * alone


def test_a_change_of_regime_is_followed() -> None:
    """Protects against a queue that becomes ten times longer: 15 jobs later it is known."""
    told = []
    for seed in range(8):
        real = [*trace(seed, 60, 600.0), *trace(seed + 50, 16, 6000.0)]
        told.append(live_through(real, [None] * len(real))[-1].median_s or 0.0)
    assert 3500.0 < np.median(told) < 9000.0


def test_waits_that_are_not_over_count() -> None:
    """Protects against forgetting those who still wait, which makes every queue look short."""
    started, waiting = waits([100.0] * 5), waits([5000.0] * 5, over=False)
    known = (SHAPE, 1e9 + 10, 30.0)
    without = by_history(started, *known)
    found = by_history(started + waiting, *known)
    assert found is not None
    assert without is not None
    assert without.quantile(0.5) == 130.0
    assert found.quantile(0.9) > 5000.0
    as_if_over = by_history(started + waits([5000.0] * 5), *known)
    assert as_if_over is not None
    assert found.quantile(0.9) > as_if_over.quantile(0.9)


def test_what_is_left_depends_on_the_wait_so_far() -> None:
    """Protects the forecast for a queued job: who outlasts the short waits is in a long one."""
    found = by_history(waits([60.0] * 9 + [7200.0] * 3), SHAPE, 1e9 + 20, 30.0)
    assert found is not None
    assert found.quantile(0.5) == 90.0
    assert found.quantile(0.5, age=400.0) == 7230.0
    assert found.quantile(0.5, age=20000.0) == pytest.approx(40000.0)  # longer than anybody


def test_quantiles_of_few_waits_are_careful() -> None:
    """Protects against reading a 0.9 quantile off the longest of two waits."""
    ones = np.ones(2)
    found = survival(np.array([100.0, 200.0]), np.array([True, True]), ones)
    assert found is not None
    assert found.quantile(0.5) == 200.0
    assert found.quantile(0.9) > 600.0
    many = survival(np.arange(1.0, 101.0), np.ones(100, bool), np.ones(100))
    assert many is not None
    assert (many.quantile(0.5), many.quantile(0.9)) == (51.0, 91.0)
    assert survival(np.empty(0), np.empty(0, bool), np.empty(0)) is None


@pytest.mark.parametrize("over", [[True, False], [False, True]])
def test_a_wait_that_lasts_as_long_could_have_ended(over: list[bool]) -> None:
    """Protects the order of equal times: who is not over yet was among those who could end."""
    found = survival(np.array([100.0, 100.0]), np.array(over), np.ones(2))
    assert found is not None
    assert found.at(100.0) == pytest.approx(2 / 3)


def test_alike_jobs_tell_more() -> None:
    """Protects the choice of what is compared: size, partition and QOS."""
    small, large = waits([60.0] * 20), waits([7200.0] * 20, shape=replace(SHAPE, nodes=64))
    mixed = [wait for pair in zip(small, large, strict=True) for wait in pair]
    for shape, expected in ((SHAPE, 90.0), (replace(SHAPE, nodes=64), 7230.0)):
        found = by_history(mixed, shape, 1e9 + 20, 30.0)
        assert found is not None
        assert found.quantile(0.5) == expected
    elsewhere = waits([7200.0] * 40, shape=replace(SHAPE, partition="debug"))
    found = by_history([*elsewhere, *waits([60.0] * 4)], SHAPE, 1e9 + 20, 30.0)
    assert found is not None
    assert found.quantile(0.5) == 90.0


def test_a_plan_is_corrected_by_its_record() -> None:
    """Protects against a scheduler that always plans four times too much."""
    past = [replace(w, plan_s=4 * (w.waited_s or 0.0)) for w in waits(trace(2, 30))]
    told = by_plan(past, 8 * HOUR, SHAPE, 1e9 + 30, 30.0).quantile(0.5)
    assert told == pytest.approx(2 * HOUR, rel=0.1)


def test_a_plan_that_tells_nothing_changes_nothing() -> None:
    """Protects against plans that have nothing to do with the waits: 0 is no promise of 0."""
    plans = HOUR * np.exp(3 * np.random.default_rng(4).normal(size=60))
    past = [replace(w, plan_s=p) for w, p in zip(waits(trace(2, 60)), [*plans], strict=True)]
    short, long = (by_plan(past, p, SHAPE, 1e9 + 60, 30.0).quantile(0.5) for p in (0.0, 9 * HOUR))
    assert long < 4 * short


def test_a_queued_jobs_plan_is_used(tmp_path: Path) -> None:
    """Protects `remaining`: the scheduler's expected start counts, and nobody is asked again."""
    clock, scheduler = FakeClock(1e9), Scheduler()
    forecast = forecaster(tmp_path, clock, scheduler)
    info = JobInfo("1", "j", "pending", expected_start_s=clock.wall() + 900.0)
    assert forecast.remaining_s(info, 50.0) == pytest.approx(900.0)
    clock.sleep(500.0)
    assert forecast.remaining_s(info, 550.0) == pytest.approx(400.0)
    assert scheduler.asked == 0


def test_the_scheduler_is_seldom_asked(tmp_path: Path) -> None:
    """Protects against a ban: one question in ten minutes by all processes, whatever comes back."""
    clock, scheduler = FakeClock(1e9), Scheduler(SchedulerUnavailableError("busy"))
    for k in range(10):
        assert forecaster(tmp_path, clock, scheduler).wait_s() is None
        forecaster(tmp_path, clock, scheduler).record_submission(f"j{k}")
        clock.sleep(50.0)
    assert scheduler.asked == 1
    scheduler.plan = UserError("no such account")
    clock.sleep(100.0)
    assert forecaster(tmp_path, clock, scheduler).wait_s() is None
    assert scheduler.asked == 2


def test_a_spoilt_file_of_plans_is_written_anew(tmp_path: Path) -> None:
    """Protects the run from a file that somebody else wrote to."""
    (tmp_path / "site.plans.json").write_text("[")
    assert forecaster(tmp_path, FakeClock(1e9), Scheduler(60.0)).wait_s() == pytest.approx(60.0)
    assert forecaster(tmp_path, FakeClock(1e9), Scheduler(90.0)).wait_s() == pytest.approx(60.0)


def test_a_job_is_told_of_twice_and_by_other_processes(tmp_path: Path) -> None:
    """Protects the record from a launcher that is killed and says everything once more."""
    clock, scheduler = FakeClock(1e9), Scheduler(600.0)
    info = JobInfo("1", "j", "running", submitted_s=clock.wall(), started_s=clock.wall() + 300.0)
    for _ in range(2):
        forecaster(tmp_path, clock, scheduler).record_submission("j")
        scheduler.plan = 0.0
        clock.sleep(700.0)
    for _ in range(2):
        forecaster(tmp_path, clock, scheduler).record_info(info)
        forecaster(tmp_path, clock, scheduler).record_cancellation("j", 5.0)
    (wait,) = forecaster(tmp_path, clock).history.waits()
    assert (wait.waited_s, wait.over, wait.plan_s) == (300.0, True, 600.0)
    assert wait.median_s == pytest.approx(600.0)
    told = forecaster(tmp_path, clock, scheduler).forecast()
    assert (told.checked, told.error_s, told.coverage) == (1, pytest.approx(300.0), 1.0)


def test_a_wait_that_did_not_end_is_known_as_far_as_it_was_seen(tmp_path: Path) -> None:
    """Protects the record of jobs that are cancelled, forgotten, held or put back."""
    clock = FakeClock(1e9)
    forecast = forecaster(tmp_path, clock)
    for job in ("seen", "cancelled", "held", "requeued", "given up", "never seen"):
        forecast.record_submission(job)
    began = clock.wall()
    clock.sleep(500.0)
    pending = JobInfo("1", "seen", "pending", submitted_s=began, expected_start_s=began + 800.0)
    forecast.record_info(pending)
    same = {"submitted_s": began, "started_s": began + 400.0, "ended_s": began + 400.0}
    forecast.record_info(JobInfo("2", "cancelled", "ended", outcome="cancelled", **same))
    forecast.record_info(JobInfo("3", "held", "pending", submitted_s=began, stuck="held"))
    forecast.record_info(JobInfo("4", "requeued", "running", restarts=1, **same))
    forecast.record_cancellation("given up", 450.0)
    found = {wait.job: wait for wait in forecast.history.waits()}
    assert not any(wait.over for wait in found.values())
    assert (found["seen"].waited_s, found["seen"].plan_s) == (500.0, 800.0)
    assert found["cancelled"].waited_s == 400.0
    assert found["given up"].waited_s == 450.0
    assert found["held"].void
    assert found["requeued"].void
    assert found["never seen"].waited_s is None


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """Protects the run: without a place to note that it was asked, the scheduler is left alone."""
    (tmp_path / "file").write_text("")
    scheduler = Scheduler(600.0)
    forecast = forecaster(tmp_path / "file" / "waits", FakeClock(1e9), scheduler)
    forecast.record_submission("j")
    assert forecast.wait_s() is None
    assert scheduler.asked == 0
