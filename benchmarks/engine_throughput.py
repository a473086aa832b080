"""What the engine costs: events per second, and memory against the number of orders done.

The simulator runs the engine and the strategies as they are, in virtual time and with the
surrogate for learning, so that what takes time is the engine, the strategy and the simulated
sites; all of it is one thread, timed in CPU seconds. First a federation of 50 facilities does
20,000 orders; measured is the resident memory of the process, with the simulator's own timeline
switched off. Then 1,000 facilities do 10,000 orders per strategy.

    python benchmarks/engine_throughput.py

Writes ``benchmarks/results/engine_throughput.json``. Ends with 1 if a federation of 1,000 takes a
minute or the memory grows by more than `LIMIT_MB`.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar
from unittest.mock import patch

import psutil
from _machine import record

from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.config import QueueModel, ScenarioConfig, SiteModel
from flwr_hpc.simulate.federation import RunSettings, simulate
from flwr_hpc.simulate.pool import Allocation, Pool
from strategies.fedbuff import FedBuff

MARKS = (1_000, 5_000, 10_000, 20_000)  # orders
LIMIT_MB, LIMIT_S = 5.0, 60.0
ANY = {f"min_{kind}_nodes": 1 for kind in ("train", "evaluate", "available")}
STRATEGIES: dict[str, tuple[dict[str, Any], int]] = {  # and the versions of 10,000 orders
    "fedbuff": ({"_target_": "strategies.fedbuff.FedBuff", "buffer_size": 50}, 200),
    "fedbackfill": ({"_target_": "strategies.fedbackfill.FedBackfill", "round_s": 200.0}, 10_000),
    "fedqueue": ({"_target_": "strategies.fedqueue.FedQueue", "round_s": 600.0}, 10),
    "flower fedavg": ({"_target_": "flwr.serverapp.strategy.FedAvg", **ANY}, 10),
}


def federation(sites: int) -> ScenarioConfig:
    """Return facilities of seven speeds, with short lognormal queues."""
    queue = QueueModel(median_s=60.0, sigma=0.5)
    models = {f"s{k:04d}": SiteModel(step_s=1.0 + k % 7, queue=queue) for k in range(sites)}
    return ScenarioConfig(sites=models, target=1e-9, horizon_h=10_000.0)


def run(scenario: ScenarioConfig, strategy: dict[str, Any], versions: int) -> Any:
    """Simulate; the loss is computed once."""
    outcome = simulate(
        scenario,
        "",
        strategy,
        RunSettings(learning="surrogate", steps=50, versions=versions, evaluate_every_s=1e12),
    )
    assert not outcome.error, outcome.error
    return outcome


class Watched(FedBuff):
    """Has the memory measured at certain numbers of orders done."""

    found: ClassVar[dict[int, float]] = {}

    def on_result(self, arrival: Any, staleness: int) -> Any:
        """Count."""
        self.count = getattr(self, "count", 0) + 1
        if self.count in MARKS:
            gc.collect()
            self.found[self.count] = resident_mb()
        return super().on_result(arrival, staleness)


def resident_mb() -> float:
    """Return the memory of this process."""
    return float(psutil.Process().memory_info().rss / 1e6)


def memory() -> dict[int, float]:
    """Return MB by orders done, of one run."""
    target = {"_target_": "__main__.Watched", "buffer_size": 10}
    run(federation(50), target, MARKS[-1] // 10)
    return Watched.found


def no_timeline(pool: Pool, a: Allocation, what: Any) -> None:
    """Stand for `Pool._segment`, which keeps what every allocation did, for plots."""
    a.since = pool.clock.now()


def throughput(name: str) -> dict[str, float]:
    """Return what a federation of 1,000 did and how fast."""
    strategy, versions = STRATEGIES[name]
    events, plain = itertools.count(), VirtualClock.at

    def at(clock: VirtualClock, when: float, call: Callable[[], None]) -> None:
        next(events)
        plain(clock, when, call)

    began = time.process_time()
    with patch.object(VirtualClock, "at", at):
        outcome = run(federation(1000), strategy, versions)
    seconds, made = time.process_time() - began, next(events)
    return {
        "orders": outcome.orders,
        "virtual_hours": outcome.hours,
        "cpu_seconds": seconds,
        "orders_per_s": outcome.orders / seconds,
        "events_per_s": made / seconds,
    }


def main() -> int:
    """Run, print and record."""
    with patch.object(Pool, "_segment", no_timeline):
        resident = memory()
    growth = resident[MARKS[-1]] - resident[MARKS[0]]
    figures: dict[str, Any] = {"resident_mb": resident, "growth_mb": growth}
    print(figures, flush=True)
    for name in STRATEGIES:
        figures[name] = throughput(name)
        print(name, figures[name], flush=True)
    config = {"facilities": {"memory": 50, "throughput": 1000}, "steps": 50}
    record("engine_throughput", figures, config)
    slow = any(figures[name]["cpu_seconds"] > LIMIT_S for name in STRATEGIES)
    return int(slow or growth > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
