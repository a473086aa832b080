"""All strategies in the four shipped scenarios, with real learning, in virtual time.

    python benchmarks/strategies/compare.py tune [CONTESTANT ...]   # settings, by search
    python benchmarks/strategies/compare.py test     # all scenarios, other seeds
    python benchmarks/strategies/compare.py ablate   # FedBackfill without each of its parts

``tune`` tries twelve settings of every contestant with the same seeds and keeps the one that is
soonest at the target; ``test`` and ``ablate`` use what it has kept. Writes
``benchmarks/results/strategies_{tune,test,ablate}.json``.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contestants import ABLATION, CONTESTANTS, STEPS, grid
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flwr_hpc.simulate.__main__ import compose
from flwr_hpc.simulate.compare import quantile, scenario_of
from flwr_hpc.simulate.federation import Outcome, simulate

sys.path.append(str(Path(__file__).parents[1]))
from _machine import RESULTS, record

SCENARIOS = ("calm", "congested", "hostile", "drift")
TUNED_IN = "congested"
TUNING_SEEDS = (100, 101)
SEEDS = (10, 11, 12, 13, 14)
TARGETS = (2.2, 1.65, 1.45)  # uninterrupted FedAvg's after 8, 20 and 35 rounds of 100 steps, about
TARGET = 1.45
GIVEN_UP_H = {"warm": 24.0, "per_round": 240.0}
TUNING_GIVEN_UP_H = {"warm": 20.0, "per_round": 120.0}
ORACLE = "oracle"


@dataclass(frozen=True)
class Case:
    """One line of a table: a strategy with settings, in a scenario."""

    name: str
    scenario: str
    target: str
    settings: tuple[tuple[str, Any], ...]
    policy: str = "warm"
    renew: bool = True
    waits: bool = True
    goal: float = min(TARGETS)
    given_up_h: float = 0.0  # 0: by the policy


@dataclass
class Times:
    """What a run took until each target: hours and node-hours, infinite if not reached."""

    hours: list[float]
    node_hours: list[float]
    loss: float


def run(task: tuple[Case, int]) -> Times:
    """Simulate a case with a seed."""
    case, seed = task
    for name in ("flwr", "strategies"):  # they tell of every round and every lost job
        logging.getLogger(name).setLevel(logging.CRITICAL)
    scenario = scenario_of(compose([f"scenario={case.scenario}"]))
    scenario.target = case.goal
    scenario.horizon_h = case.given_up_h or GIVEN_UP_H[case.policy]
    if not case.waits:
        for site in scenario.sites.values():
            site.queue.kind = "none"
    settings = {"_target_": case.target, **dict(case.settings)}
    steps = int(settings.pop(STEPS, 100))
    outcome = simulate(
        scenario, case.name, settings,
        policy=case.policy, renew=case.renew and case.policy == "warm", seed=seed, steps=steps,
    )  # fmt: skip
    return Times(
        [_first(outcome, target, 0) for target in TARGETS],
        [_first(outcome, target, 1) for target in TARGETS],
        outcome.curve[-1][2] if outcome.curve else math.inf,
    )


def _first(outcome: Outcome, target: float, column: int) -> float:
    return next((point[column] for point in outcome.curve if point[2] <= target), math.inf)


def run_all(cases: Iterable[Case], seeds: Iterable[int]) -> dict[Case, list[Times]]:
    """Run every case with every seed, on all cores."""
    tasks = [(case, seed) for case in cases for seed in seeds]
    found: dict[Case, list[Times]] = defaultdict(list)
    with ProcessPoolExecutor() as pool:
        done = zip(tasks, pool.map(run, tasks), strict=True)
        for (case, _), times in track(done, "simulating", total=len(tasks)):
            found[case].append(times)
    return found


# ---- the three parts ----------------------------------------------------------------------------


def tune(*names: str) -> None:
    """Search the settings of every contestant, or of some and keep what is known of the others."""
    wanted = {name: CONTESTANTS[name] for name in names or CONTESTANTS}
    cases = [
        Case(
            name,
            TUNED_IN,
            c.target,
            tuple(settings.items()),
            c.policy,
            goal=TARGET,
            given_up_h=TUNING_GIVEN_UP_H[c.policy],
        )
        for name, c in wanted.items()
        for settings in grid(c)
    ]
    found = run_all(cases, TUNING_SEEDS)
    best: dict[str, Any] = _best() if names else {}
    for name in wanted:
        mine = [case for case in cases if case.name == name]
        case = min(mine, key=lambda case: _badness(found[case]))
        hours = statistics.median(t.hours[TARGETS.index(TARGET)] for t in found[case])
        best[name] = {"settings": dict(case.settings), "hours": _finite(hours)}
        print(f"{name:26s} {hours:6.2f} h of {len(mine)}: {best[name]['settings']}")
    record("strategies_tune", {"best": best}, _config(TUNING_SEEDS) | {"searched": _searched()})


def _badness(runs: list[Times]) -> tuple[float, float]:
    """Order settings by the time to the target; those that do not reach it by their loss."""
    hours = statistics.median(t.hours[TARGETS.index(TARGET)] for t in runs)
    return hours, statistics.median(t.loss for t in runs)


def test() -> None:
    """Run what was tuned in all scenarios."""
    report("strategies_test", list(_contest()), reference="fedavg, job per round")


def _contest() -> Iterator[Case]:
    tuned = _tuned()
    for scenario in SCENARIOS:
        for name, c in CONTESTANTS.items():
            yield Case(name, scenario, c.target, tuple(tuned[name].items()), c.policy)
        ours = CONTESTANTS["fedbackfill"]
        settings = tuple(tuned["fedbackfill"].items())
        yield Case(f"{ORACLE} that never waits", scenario, ours.target, settings, waits=False)


def ablate() -> None:
    """Run FedBackfill without each of its parts."""
    tuned, target = _tuned()["fedbackfill"], CONTESTANTS["fedbackfill"].target
    cases = [
        Case(name, scenario, target, tuple((tuned | without).items()), policy, renew, goal=TARGET)
        for scenario in SCENARIOS
        for name, (without, policy, renew) in ABLATION.items()
    ]
    report("strategies_ablate", cases, reference="whole")


def _tuned() -> dict[str, dict[str, Any]]:
    return {name: found["settings"] for name, found in _best().items()}


def _best() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "strategies_tune.json").read_text())["best"]
    return found


# ---- what comes of it ---------------------------------------------------------------------------


def report(name: str, cases: list[Case], reference: str) -> None:
    """Run cases, print a table per scenario and write the figures."""
    found = run_all(cases, SEEDS)
    lines = [_line(case, runs) for case, runs in found.items()]
    for scenario in SCENARIOS:
        mine = [line for line in lines if line["scenario"] == scenario]
        Console().print(_table(scenario, mine, reference))
    record(name, {"lines": lines}, _config(SEEDS))


def _line(case: Case, runs: list[Times]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "scenario": case.scenario, "strategy": case.name, "policy": case.policy,
        "settings": dict(case.settings), "to": {},
    }  # fmt: skip
    for k, target in enumerate(TARGETS):
        hours, nodes = sorted(t.hours[k] for t in runs), sorted(t.node_hours[k] for t in runs)
        line["to"][f"{target:g}"] = {
            "reached": sum(math.isfinite(h) for h in hours),
            "hours": [_finite(quantile(hours, q)) for q in (0.5, 0.25, 0.75)],
            "node_hours": [_finite(quantile(nodes, q)) for q in (0.5, 0.25, 0.75)],
        }
    return line


def _table(scenario: str, lines: list[dict[str, Any]], reference: str) -> Table:
    shown = Table(title=f"{scenario}: hours to each loss", title_justify="left", box=None)
    shown.add_column("strategy", no_wrap=True)
    for target in TARGETS:
        shown.add_column(f"{target:g}", justify="right")
    for column in ("quartiles", "node-h", f"x {reference}"):
        shown.add_column(column, justify="right", no_wrap=True)
    base = next(line for line in lines if line["strategy"] == reference)
    for line in sorted(lines, key=_by_time):
        at = line["to"][f"{TARGET:g}"]
        ratio = _ratio(base["to"][f"{TARGET:g}"]["hours"][0], at["hours"][0])
        medians = [_number(line["to"][f"{t:g}"]["hours"][0]) for t in TARGETS]
        quartiles = "-".join(_number(h) for h in at["hours"][1:])
        shown.add_row(line["strategy"], *medians, quartiles, _number(at["node_hours"][0]), ratio)
    return shown


def _by_time(line: dict[str, Any]) -> list[float]:
    return [
        math.inf if (hours := line["to"][f"{t:g}"]["hours"][0]) is None else hours
        for t in (TARGET, *reversed(TARGETS[:2]))
    ]


def _ratio(base: float | None, hours: float | None) -> str:
    return "-" if base is None or hours is None else f"{base / hours:.2f}"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}"


def _finite(x: float) -> float | None:
    return round(x, 3) if math.isfinite(x) else None


def _config(seeds: Iterable[int]) -> dict[str, Any]:
    return {
        "seeds": list(seeds), "targets": list(TARGETS), "tuned_to": TARGET,
        "tuned_in": TUNED_IN, "given_up_h": GIVEN_UP_H,
        "given_up_in_tuning_h": TUNING_GIVEN_UP_H, "learning": "real",
    }  # fmt: skip


def _searched() -> dict[str, Any]:
    return {name: c.search for name, c in CONTESTANTS.items()}


PARTS: dict[str, Callable[..., None]] = {"tune": tune, "test": test, "ablate": ablate}

if __name__ == "__main__":
    part, names = sys.argv[1] if sys.argv[1:] else "", sys.argv[2:]
    if part not in ("", *PARTS) or set(names) - set(CONTESTANTS) or (names and part != "tune"):
        sys.exit(f"found {sys.argv[1:]}. Valid: nothing, {', '.join(PARTS)}, tune CONTESTANT ...")
    for name in [part] if part else PARTS:
        PARTS[name](*names)
