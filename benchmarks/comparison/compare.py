"""Every strategy on two learning tasks in five scenarios of the simulator, tuned alike.

    python benchmarks/comparison/compare.py                     # all three parts, then the tables
    python benchmarks/comparison/compare.py tune --task text    # a part of them
    python benchmarks/comparison/compare.py test --minutes 10   # as far as it comes
    python benchmarks/comparison/compare.py tables              # of what there is

``tune`` tries the same number of settings of every contestant with the same seeds and keeps the
one that is soonest at the target: all with the first seed, the best few with the second.
``test`` and ``ablate`` use what it has kept. Runs that are over are in
``benchmarks/results/strategies_runs.jsonl`` and are not made again; the figures
are written to ``benchmarks/results/strategies_{tune,test,ablate}.json``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from case_runs import TARGETS, Case, Runs, Times  # first: it limits numpy's threads

# isort: split
from contestants import ABLATION, CONTESTANTS, grid
from tables import Line, best_of, line, print_ratios, print_table

sys.path.append(str(Path(__file__).parents[1]))
from _machine import RESULTS, record

SCENARIOS = ("calm", "congested", "hostile", "drift", "trace")
TASKS = ("network", "text")
TUNED_IN = "congested"
TUNING_SEEDS = (200, 201)
SEEDS = {"network": (20, 21, 22, 23, 24), "text": (20, 21, 22)}
ABLATION_SEEDS = (20, 21, 22)
SECOND_ROUND = {"network": 2, "text": 0}  # settings that are tried with the second seed
GIVEN_UP_H = {"warm": 24.0, "per_round": 120.0}
TUNING_GIVEN_UP_H = {
    "network": {"warm": 8.0, "per_round": 40.0},
    "text": {"warm": 5.0, "per_round": 20.0},
}
RUNS = RESULTS / "strategies_runs.jsonl"
ORACLES = {"oracle that never waits": "none", "oracle that waits for first jobs": "first"}
REFERENCE = "fedavg, job per round"
OURS = ("fedbackfill", "fedbackfill_rounds")


# ---- tune ---------------------------------------------------------------------------------------


def tune(runs: Runs, task: str, names: list[str], until: float) -> None:
    """Search the settings of every contestant on a task."""
    cases = {name: list(_candidates(runs, name, task)) for name in names}
    first, second = TUNING_SEEDS
    if not runs.complete([c for found in cases.values() for c in found], [first], until):
        return
    best = {
        name: _ranked(runs, found, [first])[: SECOND_ROUND[task]] for name, found in cases.items()
    }
    runs.complete([c for found in best.values() for c in found], [second], until)


def _candidates(runs: Runs, name: str, task: str) -> Iterator[Case]:
    """Yield the cases of a contestant that are tried on a task."""
    c = CONTESTANTS[name]
    settings_tried = grid(c)
    if task == "text":
        best = _tuning_order(runs, name, "network")[:1] if c.on_text else []
        searched = [(key, value) for key, values in (c.on_text or {}).items() for value in values]
        settings_tried = [
            {**dict(case.settings), key: value} for case in best for key, value in searched
        ]
    for settings in settings_tried:
        yield _case(name, task, TUNED_IN, settings, TUNING_GIVEN_UP_H[task])


def _case(
    name: str, task: str, scenario: str, settings: dict[str, Any], given_up_h: dict[str, float]
) -> Case:
    c = CONTESTANTS[name]
    items = tuple(settings.items())
    return Case(name, task, scenario, c.target, items, given_up_h[c.policy], c.policy)


def _tuning_order(runs: Runs, name: str, task: str) -> list[Case]:
    """Return a contestant's cases, the best first: of those with both seeds, then of the others."""
    cases = list(_candidates(runs, name, task))
    twice = [c for c in cases if len(runs.of(c, TUNING_SEEDS)) == len(TUNING_SEEDS)]
    once = [c for c in cases if c not in twice and runs.of(c, TUNING_SEEDS[:1])]
    return _ranked(runs, twice, TUNING_SEEDS) + _ranked(runs, once, TUNING_SEEDS[:1])


def _ranked(runs: Runs, cases: Iterable[Case], seeds: Iterable[int]) -> list[Case]:
    return sorted(cases, key=lambda case: _badness(runs.of(case, seeds)))


def _badness(found: list[Times]) -> tuple[float, float]:
    """Order settings by the time to the target; those that do not reach it by their loss."""
    hours = statistics.mean(t.hours[-1] for t in found)
    return hours, statistics.mean(t.loss for t in found)


def tuned(runs: Runs, task: str) -> dict[str, dict[str, Any]]:
    """Return the best settings of every contestant that has been tuned on a task."""
    order = {name: _tuning_order(runs, name, task) for name in CONTESTANTS}
    return {name: dict(found[0].settings) for name, found in order.items() if found}


# ---- test and ablate ----------------------------------------------------------------------------


def contest(runs: Runs, task: str) -> Iterator[Case]:
    """Yield what was tuned, and the oracles, in all scenarios."""
    best = tuned(runs, task)
    for scenario in SCENARIOS:
        for name, settings in best.items():
            yield _case(name, task, scenario, settings, GIVEN_UP_H)
        for name, waits in ORACLES.items() if "fedbackfill" in best else ():
            ours = _case("fedbackfill", task, scenario, best["fedbackfill"], GIVEN_UP_H)
            yield Case(**(vars(ours) | {"name": name, "waits": waits}))


def ablation(runs: Runs) -> Iterator[Case]:
    """Yield FedBackfill without each of its parts, on the first task."""
    settings = tuned(runs, TASKS[0])["fedbackfill"]
    for scenario in SCENARIOS:
        whole = vars(_case("fedbackfill", TASKS[0], scenario, settings, GIVEN_UP_H))
        for name, (without, facility) in ABLATION.items():
            changed = tuple((settings | without).items())
            yield Case(**(whole | {"name": name, "settings": changed} | facility))


def tables(runs: Runs) -> None:
    """Print the tables of what there is, and write the figures."""
    contests = {t: [line(c, runs.of(c, SEEDS[t])) for c in contest(runs, t)] for t in TASKS}
    for task, lines in contests.items():
        print_table(f"{task}: hours to {TARGETS[task][-1]:g}", lines, SCENARIOS)
        print_ratios(f"{task}: times as long", lines, SCENARIOS, list(_pairs(lines)))
    parts = [line(c, runs.of(c, ABLATION_SEEDS)) for c in ablation(runs)]
    pairs = [(name, "whole") for name in ABLATION if name != "whole"]
    print_ratios("FedBackfill without a part: times as long", parts, SCENARIOS, pairs)
    searched = {name: c.search for name, c in CONTESTANTS.items()}
    best = {task: tuned(runs, task) for task in TASKS}
    record("strategies_tune", {"best": best}, _config() | {"searched": searched})
    record("strategies_test", {"lines": contests}, _config())
    if all(one["runs"] for one in parts):
        record("strategies_ablate", {"lines": parts}, _config())


def _pairs(lines: list[Line]) -> Iterator[tuple[str, str]]:
    """Yield who is compared with whom."""
    everybody = [*ORACLES, *(name for name in CONTESTANTS if name.startswith("fedbackfill"))]
    as_published = [*everybody, *(name for name in CONTESTANTS if "averaged" in name)]
    best = [best_of(lines, s, out) for out in (as_published, everybody) for s in SCENARIOS]
    for ours in OURS:
        yield REFERENCE, ours
        for other in dict.fromkeys(best):
            yield other, ours
        for oracle in ORACLES:
            yield ours, oracle


def _config() -> dict[str, Any]:
    return {
        "tuning_seeds": TUNING_SEEDS, "tuned_in": TUNED_IN, "second_round": SECOND_ROUND,
        "seeds": SEEDS, "ablation_seeds": ABLATION_SEEDS,
        "targets": TARGETS, "given_up_h": GIVEN_UP_H,
        "given_up_in_tuning_h": TUNING_GIVEN_UP_H,
    }  # fmt: skip


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=["tune", "test", "ablate", "tables"])
    parser.add_argument("names", nargs="*", metavar="CONTESTANT", help="tune: these alone")
    parser.add_argument("--task", choices=TASKS, help="this one alone")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after these")
    parser.add_argument("--seeds", type=int, help="test and ablate: with so many seeds at first")
    args = parser.parse_intermixed_args()
    if unknown := set(args.names) - set(CONTESTANTS):
        parser.error(f"{', '.join(unknown)}: not known. Valid: {', '.join(CONTESTANTS)}")
    runs, until = Runs(RUNS), time.monotonic() + 60.0 * args.minutes
    for task in [args.task] if args.task else TASKS:
        if args.part in (None, "tune"):
            tune(runs, task, args.names or list(CONTESTANTS), until)
        if args.part in (None, "test"):
            runs.complete(contest(runs, task), SEEDS[task][: args.seeds], until)
    if args.part in (None, "ablate"):
        runs.complete(ablation(runs), ABLATION_SEEDS[: args.seeds], until)
    if args.part in (None, "tables"):
        tables(runs)


if __name__ == "__main__":
    main()
