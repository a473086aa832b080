"""Simulated runs of strategies, each kept in a file as soon as it is over.

So a comparison can be made in parts: what is in the file is not run again. A change of the
strategies or of the simulator makes the file worthless; delete it then.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # ahead of numpy: a core per run

from rich.progress import track

from flwr_hpc.simulate.__main__ import compose
from flwr_hpc.simulate.compare import scenario_of
from flwr_hpc.simulate.federation import RunOutcome, RunSettings, simulate
from flwr_hpc.simulate.pool import RENEWAL

STEPS = "steps"  # per order where the strategy does not decide: no argument of the strategy
# Held-out losses whose times are noted, by learning task; a run ends at the last.
TARGETS = {"network": (2.2, 1.65, 1.45), "text": (2.2, 1.9, 1.7)}
EVALUATE_EVERY_S = {"network": 60.0, "text": 120.0}
# What is waited for: every job; each site's first job alone; none.
WAITS = ("all", "first", "none")


@dataclass(frozen=True)
class Case:
    """One line of a table: a strategy with settings, on a task in a scenario."""

    name: str
    task: str
    scenario: str
    target: str  # The strategy's class
    settings: tuple[tuple[str, Any], ...]
    given_up_h: float
    policy: str = "warm"
    max_successors: int = RENEWAL.max_successors
    waits: str = "all"
    partial_work: bool = True
    back_off: bool = True


@dataclass(frozen=True)
class Times:
    """What a run took until each target: hours and node-hours, infinite if not reached."""

    hours: list[float]
    node_hours: list[float]
    loss: float  # In the end
    cpu_s: float


def run(case: Case, seed: int) -> Times:
    """Simulate a case with a seed."""
    for name in ("flwr", "strategies"):  # they tell of every round and every lost job
        logging.getLogger(name).setLevel(logging.CRITICAL)
    began = time.process_time()
    scenario = scenario_of(compose([f"scenario={case.scenario}"]))
    scenario.target, scenario.horizon_h = TARGETS[case.task][-1], case.given_up_h
    for site in scenario.sites.values():
        site.queue.kind = "none" if case.waits == "none" else site.queue.kind
        site.queue.first_wait_only = case.waits == "first"
    arguments = {"_target_": case.target, **dict(case.settings)}
    steps = int(arguments.pop(STEPS, 100))
    settings = RunSettings(
        policy=case.policy, max_successors=case.max_successors, partial_work=case.partial_work,
        back_off=case.back_off, seed=seed, steps=steps, learning=case.task,
        evaluate_every_s=EVALUATE_EVERY_S[case.task],
    )  # fmt: skip
    outcome = simulate(scenario, case.name, arguments, settings)
    columns = [[_first(outcome, t, column) for t in TARGETS[case.task]] for column in (0, 1)]
    loss = outcome.curve[-1][2] if outcome.curve else math.inf
    return Times(columns[0], columns[1], loss, time.process_time() - began)


def _first(outcome: RunOutcome, target: float, column: int) -> float:
    return next((point[column] for point in outcome.curve if point[2] <= target), math.inf)


class Runs:
    """The runs that are over, in a file of a line each.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._over: dict[str, Times] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            self._over[_key(entry["case"], entry["seed"])] = Times(**entry["times"])

    def of(self, case: Case, seeds: Iterable[int]) -> list[Times]:
        """Return the runs of a case that are over, of these seeds."""
        keys = [_key(asdict(case), seed) for seed in seeds]
        return [self._over[key] for key in keys if key in self._over]

    def complete(self, cases: Iterable[Case], seeds: Iterable[int], until: float) -> bool:
        """Run what is missing on all cores, seed by seed; return whether nothing is.

        No run begins after `until`, by `time.monotonic`.
        """
        wanted, cases = [], list(cases)
        for seed in seeds:
            wanted += [(c, seed) for c in cases if not self.of(c, [seed])]
        for case, seed, times in track(
            _in_parallel(wanted, until), "simulating", total=len(wanted)
        ):
            self._over[_key(asdict(case), seed)] = times
            entry = {"case": asdict(case), "seed": seed, "times": asdict(times)}
            with open(self._path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        return all(self.of(case, [seed]) for case, seed in wanted)


def _in_parallel(wanted: list[tuple[Case, int]], until: float) -> Iterator[tuple[Case, int, Times]]:
    """Yield the runs as they come."""
    with ProcessPoolExecutor() as pool:
        begun: dict[Any, tuple[Case, int]] = {}
        left = iter(wanted)
        while True:
            while len(begun) < 2 * (os.cpu_count() or 1) and time.monotonic() < until:
                if (task := next(left, None)) is None:
                    break
                begun[pool.submit(run, *task)] = task
            if not begun:
                return
            for future in wait(begun, return_when=FIRST_COMPLETED).done:
                yield *begun.pop(future), future.result()


def _key(case: dict[str, Any], seed: int) -> str:
    return json.dumps([case, seed], sort_keys=True)
