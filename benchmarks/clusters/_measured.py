"""What a real run took: the figures to compare, and those the simulator is fed with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from safetensors.numpy import load_file

from flwr_hpc.simulate.learning.base import Learner
from flwr_hpc.simulate.learning.network import NetworkConfig, NetworkLearner
from flwr_hpc.spool import AllocationDir, Spool

__all__ = ["Figures", "Speeds", "figures", "speeds"]

Event = dict[str, Any]


@dataclass(frozen=True)
class Speeds:
    """One site as measured; seconds.

    Attributes
    ----------
    step_s, startup_s, write_s : float
        A step; from the job's start to the ready worker; all that an order takes in the job
        besides its steps.
    reserves_s : list of float
        What was left of the walltime when workers left for its sake, by job; the mean where
        they left for other reasons, and nothing where all did.
    latency_s, message_s : float
        A message one way, polls and weights included; what it takes longer on its way in, where
        Flower starts a process for it.
    waits_s, forecasts_s : list of float
        Of the jobs in the order of their submission; what was expected of the waits then, 0 of
        jobs that were not submitted ahead.
    """

    step_s: float
    startup_s: float
    write_s: float
    reserves_s: list[float]
    latency_s: float
    message_s: float
    waits_s: list[float]
    forecasts_s: list[float]


@dataclass(frozen=True)
class Figures:
    """What is compared, real or simulated.

    Attributes
    ----------
    wall_s, node_s : float
        From the first submission to the last version; node seconds by then.
    loss : float
        Held-out loss of the last version.
    curve : list of (float, float)
        Seconds and loss of every version.
    """

    wall_s: float
    node_s: float
    loss: float
    curve: list[tuple[float, float]]

    def reached_s(self, target: float) -> float | None:
        """Return when the loss was first no more than the target."""
        return next((at for at, loss in self.curve if loss <= target), None)


def figures(run: Path, judge: Learner) -> Figures:
    """Return the figures of a finished run."""
    events = _lines(run / "events.jsonl")
    made = {e["version"]: e["t"] for e in events if e["event"] == "aggregated"}
    losses = {e["version"]: e["held_out_loss"] for e in events if e["event"] == "evaluated"}
    last = max(made)
    losses[last] = judge.evaluate(load_file(run / "model" / "model.safetensors"))
    jobs = [job for site in _sites(run) for job in _jobs(site)]
    first, end = min(job["submitted"] for job in jobs), made[last]
    node_s = sum(
        max(0.0, min(job["ended"] or end, end) - job["started"])
        for job in jobs
        if job["started"] is not None
    )
    curve = [(made[v] - first, losses[v]) for v in sorted(made) if v in losses]
    return Figures(end - first, node_s, losses[last], curve)


def speeds(run: Path) -> dict[str, Speeds]:
    """Return what the simulator is fed with, by site."""
    events = _lines(run / "events.jsonl")
    return {site.name: _speeds(site, events) for site in _sites(run)}


def learner(sites: int, seed: int) -> Learner:
    """Return what was trained, to evaluate weights with."""
    return NetworkLearner(sites, NetworkConfig(), seed)


def _speeds(site: Path, events: list[Event]) -> Speeds:
    mine = [e for e in events if e.get("facility") == site.name]
    sent = {e["order_id"]: e["t"] for e in mine if e["event"] == "order_sent"}
    done = {e["order_id"]: e for e in mine if e["event"] == "order_done"}
    told = _lines(site / "paced.jsonl")
    ready = {t["allocation"]: t["t"] for t in told if t["what"] == "ready"}
    orders = [t for t in told if t["what"] == "order" and t["order"] in done]
    trained = [done[t["order"]] for t in orders if done[t["order"]]["kind"] == "train"]
    # Of orders that were sent to a worker that was there: from the server into the job, and back.
    prompt = [t for t in orders if ready[t["allocation"]] <= sent[t["order"]] <= t["seen"]]
    down = [t["seen"] - sent[t["order"]] for t in prompt]
    up = [done[t["order"]]["t"] - t["t"] for t in prompt]
    left = {t["allocation"]: t["left_s"] for t in told if t["what"] == "over"}
    jobs = _jobs(site)
    steps = sum(e["steps"] for e in trained)
    return Speeds(
        step_s=sum(e["seconds"]["train"] for e in trained) / steps,
        startup_s=mean(job["ready"] - job["started"] for job in jobs if job["ready"]),
        write_s=mean(t["t"] - t["seen"] - t["train_s"] for t in orders),
        reserves_s=[left.get(job["name"], mean(left.values())) for job in jobs if left],
        latency_s=mean(up),
        message_s=max(0.0, mean(down) - mean(up)),
        waits_s=_waits(jobs),
        forecasts_s=_ahead(jobs, _forecasts(site)),
    )


def _waits(jobs: list[dict[str, Any]]) -> list[float]:
    """Return waits; of a job that never started it is known that it was longer than so much."""
    known = [job["started"] - job["submitted"] for job in jobs if job["started"] is not None]
    usual = median(known)
    return [
        job["started"] - job["submitted"]
        if job["started"] is not None
        else max(usual, (job["ended"] or job["submitted"]) - job["submitted"])
        for job in jobs
    ]


def _ahead(jobs: list[dict[str, Any]], forecasts: Mapping[str, float]) -> list[float]:
    """Return the forecasts that had jobs submitted ahead of their predecessor's end."""
    former = [None, *(job["ended"] for job in jobs[:-1])]
    return [
        forecasts.get(job["name"], 0.0) if end is not None and job["submitted"] < end else 0.0
        for job, end in zip(jobs, former, strict=True)
    ]


def _forecasts(site: Path) -> dict[str, float]:
    """Return what the launcher expected of its jobs' waits, by allocation."""
    run = site.parents[1]
    told = _lines(run.with_name(f"{run.name}-state") / "waits" / f"{site.name}.jsonl")
    known = [t for t in told if t.get("median_s") is not None]
    return {t["job"].rpartition("-")[2]: t["median_s"] for t in known}


def _jobs(site: Path) -> list[dict[str, Any]]:
    """Return submission, start, readiness and end of the jobs in the order of submission."""
    ready = {t["allocation"]: t for t in _lines(site / "paced.jsonl") if t["what"] == "ready"}
    found = []
    for alloc in Spool(site).allocations():
        job = alloc.job()
        if job is None:
            continue
        said = ready.get(alloc.name)
        found.append(
            {
                "name": alloc.name,
                "submitted": job["submitted_s"],
                "started": None if said is None else said["began"],
                "ready": None if said is None else said["t"],
                "ended": _ended(alloc),
            }
        )
    return found


def _ended(alloc: AllocationDir) -> float | None:
    times = alloc.times.read()
    return times.cycles[-1].ended_s if times and times.cycles else None


def _sites(run: Path) -> list[Path]:
    return sorted((run / "facilities").iterdir())


def _lines(path: Path) -> list[Event]:
    lines: Iterable[str] = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
