"""Events of a made-up run in virtual time: realistic enough to look at, always the same."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]
NAMES = ("leonardo", "jupiter", "lumi", "marenostrum", "alps", "vega", "karolina", "meluxina")


@dataclass
class Site:
    """One facility of the made-up run."""

    name: str
    speed: float  # seconds per step
    queue_s: float
    floor: float  # the loss it comes down to
    steps: int = 0
    seq: int = 0
    allocations: int = 0
    ready_s: float | None = None
    ledger: dict[str, dict[str, float]] = field(default_factory=dict)


def run_events(
    facilities: int = 3,
    rounds: int = 12,
    *,
    steps: int = 40,
    resume_at: int | None = 7,
    replace_at: int | None = 5,
    reject_at: int | None = 4,
    status: str | None = "finished",
    scale: float = 1.0,
    progress: int = 8,
) -> list[Event]:
    """Return the events of a synchronous run; `scale` stretches the queue waits."""
    rng = random.Random(0)
    names = NAMES[:facilities]
    sites = [
        Site(n, 1.5 + 0.4 * i, scale * (90 + 160 * i), 1.9 + 0.08 * i) for i, n in enumerate(names)
    ]
    log: list[Event] = []

    def emit(s: float, event: str, **fields: Any) -> None:
        log.append({"t": 1.7e9 + s, "s": round(s, 3), "event": event, **fields})

    def start(s: float, version: int) -> None:
        emit(s, "run_started", run_key="k7f3", strategy="DiLoCo", rounds=rounds,
             facilities=list(names), resumed=version > 0, version=version)  # fmt: skip
        for i, site in enumerate(sites):
            emit(s + 1 + i, "site_online", facility=site.name)

    start(0.0, 0)
    clock = 5.0
    for version in range(rounds):
        if version == resume_at:
            start(clock + 4, version)
            clock += 9
        replies = []
        for i, site in enumerate(sites):
            lost = version == replace_at and i == 1 % facilities
            bad = version == reject_at and i == 0
            events, done = one_order(site, version, clock, steps, rng, lost, bad, progress)
            log.extend(events)
            replies.append(done)
        clock = max(replies) + 2
        emit(clock, "aggregated", version=version + 1, round=version + 1, facilities=list(names),
             staleness=dict.fromkeys(names, 0), weights=dict.fromkeys(names, 1.0))  # fmt: skip
    for site in sites:
        emit(clock + 3, "evaluated", facility=site.name, version=rounds,
             held_out_loss=held_out(site, rounds, steps))  # fmt: skip
    if status:
        emit(clock + 5, "run_finished", status=status, error="")
    return sorted(log, key=lambda e: e["s"])


def held_out(site: Site, version: int, steps: int) -> float:
    """Return a plausible loss of a version."""
    return site.floor + 3.6 * math.exp(-version * steps / 130) + 0.3 / (1 + version * steps / 90)


def one_order(
    site: Site, version: int, s: float, steps: int, rng: random.Random, lost: bool, bad: bool,
    progress: int,
) -> tuple[list[Event], float]:  # fmt: skip
    """Return the events of one round at one facility, and when its reply came."""
    log: list[Event] = []

    def emit(s: float, event: str, **fields: Any) -> None:
        base = {"t": 1.7e9 + s, "s": round(s, 3), "event": event, "facility": site.name}
        log.append({**base, **fields})

    if site.ready_s is None:
        s = acquire(site, s, emit, rng)
    work = {"version": version, "kind": "train", "steps": steps}
    order_id = f"k7f3-{site.name}-{site.seq:06d}"
    emit(s, "order_sent", order_id=order_id, attempt=0, **work)
    if lost:  # the job dies in the middle of the order
        s += steps * site.speed / 2
        emit(s, "order_failed", order_id=order_id, attempt=0, fatal=False,
             reason="allocation ended: node failure (slurm state NODE_FAIL)")  # fmt: skip
        emit(s, "allocation", allocation=current(site), state="ended")
        s = acquire(site, s + 2, emit, rng)
        emit(s, "order_sent", order_id=order_id, attempt=1, **work)
    train, evaluate, transfer = steps * site.speed, 6.0, 5 + 3 * rng.random()
    rate = 16_384 / site.speed
    for k in range(1, progress + 1):
        step = steps * k // progress
        emit(s + transfer / 2 + evaluate + train * k / progress, "order_progress",
             order_id=order_id, step=step, steps=steps,
             loss=held_out(site, 0, 1) - 0.02 + (held_out(site, 1, site.steps + step)
             - held_out(site, 0, 1)) + rng.gauss(0, 0.05),
             tokens_per_s=rate * rng.uniform(0.95, 1.02))  # fmt: skip
    trip = transfer + evaluate + train
    ledger = site.ledger[current(site)]
    for phase, seconds in (("train", train), ("evaluate", evaluate), ("transfer", transfer)):
        ledger[phase] += seconds
    s += trip
    site.seq += 1
    if bad:
        emit(s, "order_rejected", order_id=order_id, reason="'lm_head.weight' holds NaN")
        emit(s, "order_failed", order_id=order_id, attempt=0, fatal=False,
             reason="rejected: 'lm_head.weight' holds NaN")  # fmt: skip
        return log, s
    site.steps += steps
    emit(s, "order_done", order_id=order_id, **work, tokens=steps * 16_384, examples=steps * 64,
         metrics={"train_loss": held_out(site, 1, site.steps), "grad_norm": 0.8,
                  "held_out_loss": held_out(site, version, steps), "tokens_per_s": rate,
                  "mfu": 0.41, "peak_memory_gb": 37.5},
         seconds={"read": 0.6, "train": train, "evaluate": evaluate, "write": 0.9,
                  "first_step": 1.1},
         ledger=json.loads(json.dumps(site.ledger)), round_trip_s=trip)  # fmt: skip
    emit(s, "evaluated", version=version, held_out_loss=held_out(site, version, steps))
    return log, s


def current(site: Site) -> str:
    """Return the name of the newest allocation."""
    return f"{site.name}-{site.allocations:03d}"


def acquire(site: Site, s: float, emit: Any, rng: random.Random) -> float:
    """Queue, start and load an allocation; return when it is ready."""
    site.allocations += 1
    queue, startup, load = site.queue_s * rng.uniform(0.6, 1.3), 18.0, 25.0
    emit(s, "allocation", allocation=current(site), state="queued", queue_wait_s=site.queue_s)
    emit(s + queue, "allocation", allocation=current(site), state="starting")
    site.ready_s = s + queue + startup + load
    emit(site.ready_s, "allocation", allocation=current(site), state="ready",
         walltime_left_s=7000.0)  # fmt: skip
    zero = dict.fromkeys(("train", "evaluate", "transfer", "idle"), 0.0)
    site.ledger[current(site)] = {"queue": queue, "startup": startup, "load": load, **zero}
    return site.ready_s + 1


def write_log(path: Path, events: list[Event]) -> None:
    """Write events as a log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in events))
