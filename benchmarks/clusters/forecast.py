"""How good the queue forecast is on a contended cluster.

Brings up a real Slurm cluster (`tests/lab`, as root). Other users' jobs, by a seeded schedule in
spells of much and of little, keep it full; ours are submitted one after the other, and what the
forecaster says at each submission is held against the real wait. From the same trace the
forecasts by each source alone are made afterwards, each from what was known at that time.

    python benchmarks/clusters/forecast.py [seconds]

Writes ``benchmarks/results/forecast.json``. Hours of a centre are seconds here.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flwr_hpc.clock import SystemClock
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.schedulers.base import JobInfo, JobSpec
from flwr_hpc.schedulers.slurm.adapter import SlurmScheduler
from flwr_hpc.site.forecast.estimate import Estimate, estimate
from flwr_hpc.site.forecast.forecaster import Forecaster
from flwr_hpc.site.forecast.history import Wait, shape_of
from flwr_hpc.site.forecast.score import score_forecasts

sys.path.append(str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _machine import record
from lab.cluster import Cluster
from lab.host import missing
from lab.plan import Shape as ClusterShape

SEED = 11
NODES = 8
OUR_NODES = 2
EVERY_S = 5.0  # between two jobs of ours
SPELL_S = 60.0
LOAD = (1.2, 0.6)  # of the cluster by others, in a busy and in a calm spell
RUN_S = 20.0  # mean of others' jobs
WARM_UP = 20  # jobs that are not counted
POLL_S = 0.2
FLOOR_S = 1.0  # the forecaster's, where polls are quicker

Event = tuple[float, str, dict[str, Any]]


def schedule(seconds: float) -> list[Event]:
    """Return when whose jobs are submitted."""
    rng = np.random.default_rng(SEED)
    events: list[Event] = []
    at = 0.0
    sizes = np.array([1, 2, 4])
    while at < seconds:
        load = LOAD[int(at / SPELL_S) % 2]
        at += float(rng.exponential(RUN_S * 1.75 / (load * NODES)))
        run = float(np.clip(rng.lognormal(np.log(RUN_S) - 0.32, 0.8), 1, 55))
        nodes = int(rng.choice(sizes, p=[0.55, 0.35, 0.1]))
        limit = int(rng.choice([1, 1, 1, 2]))  # minutes: most ask for more than they use
        events.append((at, "others", {"nodes": nodes, "run": run, "limit": limit}))
    for at in np.arange(5.0, seconds, EVERY_S):
        run = 2.0 + float(rng.uniform(0, 4))
        events.append((float(at + rng.uniform(-1, 1)), "ours", {"run": run}))
    return sorted(events, key=lambda event: event[0])


class Trace:
    """Our jobs on the cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        env = {"SLURM_CONF": str(cluster.conf)}
        self.facility = FacilityConfig(
            account=None, partition="main", nodes=OUR_NODES, walltime="00:01:00",
            poll_s=POLL_S, env=env, options={"exclusive": ""},
        )  # fmt: skip
        self.cluster = cluster
        self.scheduler = SlurmScheduler(self.facility)
        spec = JobSpec("probe", folder / "job", self.facility, print)
        self.forecaster = Forecaster("lab", spec, self.scheduler, SystemClock(), folder)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.squeue: dict[str, float] = {}  # first plan of a queued job

    def submit(self, kind: str, job: dict[str, Any]) -> None:
        """Submit a job that sleeps."""
        ours = kind == "ours"
        name = f"ours-{len(self.jobs):04d}" if ours else "work"
        if ours:
            self.forecaster.submitting(name)
        nodes, limit = (OUR_NODES, 1) if ours else (job["nodes"], job["limit"])
        shape = [f"--nodes={nodes}", f"--time={limit}", "--exclusive", "--partition=main"]
        output = ["--output=/dev/null", "--chdir=/", f"--job-name={name}"]
        command = ["sbatch", "--parsable", *shape, *output, f"--wrap=sleep {job['run']:.1f}"]
        job_id = self.cluster.slurm(*command, user="root" if ours else "nobody").strip()
        if ours:
            self.jobs[name] = {"id": job_id, "name": name, "submitted_s": time.time()}

    def look(self) -> int:
        """Tell the forecaster the news; return how many of our jobs have not started."""
        waiting = [job for job in self.jobs.values() if not job.get("seen")]
        for name, info in self.scheduler.infos(waiting).items():
            self._heard(name, info)
        return sum(not job.get("seen") for job in self.jobs.values())

    def _heard(self, name: str, info: JobInfo) -> None:
        self.forecaster.observe(info)
        if info.state in ("running", "ended"):
            self.jobs[name]["seen"] = True
        elif info.expected_start_s is not None and info.submitted_s is not None:
            self.squeue.setdefault(name, max(0.0, info.expected_start_s - info.submitted_s))


def live(trace: Trace, seconds: float) -> list[Wait]:
    """Play the schedule and return the record of our jobs."""
    events, began, looked = schedule(seconds), time.monotonic(), 0.0
    while events:
        now = time.monotonic() - began
        while events and events[0][0] <= now:
            _, kind, job = events.pop(0)
            trace.submit(kind, job)
        if now - looked > 1.0:
            trace.look()
            looked = now
        time.sleep(0.1)
    deadline = time.monotonic() + 60
    while trace.look() and time.monotonic() < deadline:
        time.sleep(1.0)
    return [wait for wait in trace.forecaster.history.waits() if wait.over]


def known_at(waits: Sequence[Wait], now: float) -> list[Wait]:
    """Return what was known of earlier jobs at a time."""
    seen = []
    for wait in waits:
        age = now - wait.submitted_s
        if age > 0 and wait.waited_s is not None:
            over = wait.waited_s <= age
            seen.append(wait if over else replace(wait, waited_s=age, over=False))
    return seen


def replay(waits: Sequence[Wait], plan: Callable[[Wait], float | None], past: bool) -> list[Wait]:
    """Return the record that a forecaster with these sources would have."""
    told: list[Wait] = []
    for wait in waits:
        shape, now = wait.shape, wait.submitted_s
        found: Estimate = estimate(known_at(told, now), shape, now, FLOOR_S, plan(wait))
        if not past:
            found = replace(found, history=None)
        told.append(replace(wait, **found.record()))
    return told


def figures(waits: Sequence[Wait]) -> dict[str, float | None]:
    """Return what forecasts were worth once warm."""
    checked, error, coverage = score_forecasts(waits[WARM_UP:], 0.9)
    told = [w for w in waits[WARM_UP:] if w.high_s is not None]
    high = np.array([w.high_s for w in told], dtype=np.float64)
    over = np.array([w.waited_s for w in told], dtype=np.float64) - high
    return {
        "jobs": checked,
        "median_absolute_error_s": error,
        "coverage_of_0.9_quantile": coverage,
        "median_of_0.9_quantile_s": float(np.median(high)),
        "pinball_loss_of_0.9_quantile_s": float(np.mean(np.maximum(0.9 * over, -0.1 * over))),
    }


def as_given(waits: Sequence[Wait], plans: Sequence[float | None]) -> dict[str, float | None]:
    """Return the worth of plans as they are: the plan is both the median and the bound."""
    given = zip(waits, plans, strict=True)
    return figures([replace(w, median_s=plan, high_s=plan, quantile=0.9) for w, plan in given])


def main(seconds: float) -> None:
    """Run, print and record."""
    if reason := missing():
        print(f"skipped: {reason}")
        return
    shape = ClusterShape(nodes=NODES, cpus=2, accounting=False)
    folder = Path(tempfile.mkdtemp())
    try:
        with Cluster.up("forecast", shape) as cluster:
            trace = Trace(cluster, folder)
            waits = live(trace, seconds)
    finally:
        shutil.rmtree(folder)
    assert len(waits) > 2 * WARM_UP, f"only {len(waits)} jobs started"
    real = np.array([w.waited_s for w in waits[WARM_UP:]], dtype=np.float64)
    found = {
        "forecast": figures(waits),
        "history alone": figures(replay(waits, lambda wait: None, past=True)),
        "sbatch --test-only, corrected": figures(replay(waits, lambda w: w.plan_s, past=False)),
        "sbatch --test-only": as_given(waits, [w.plan_s for w in waits]),
        "squeue --start": as_given(waits, [trace.squeue.get(w.job) for w in waits]),
    }
    spread = {f"{q:g}": float(np.quantile(real, q)) for q in (0.1, 0.5, 0.9, 1.0)}
    print(f"real waits of {len(real)} jobs, quantiles in s: {spread}")
    for name, row in found.items():
        print(f"{name:>30}: {row}")
    config = {
        "seconds": seconds, "seed": SEED, "nodes": NODES, "our_nodes": OUR_NODES,
        "every_s": EVERY_S, "load_by_others": LOAD, "spell_s": SPELL_S, "warm_up": WARM_UP,
        "shape": vars(shape_of(trace.facility)),
    }  # fmt: skip
    never = len(trace.jobs) - len(waits)
    measured = {"jobs_that_never_started": never, "real_wait_s": spread, "forecasts": found}
    record("forecast", measured, config)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 480.0)
