"""What comes of the runs: medians and quartiles, as lines for JSON and as tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from case_runs import TARGETS, Case, Times

from flwr_hpc.simulate.compare import quantile

Line = dict[str, Any]


def line(case: Case, found: Sequence[Times]) -> Line:
    """Return a case's figures; None where fewer than half of the runs came there."""
    shown: Line = {
        "task": case.task, "scenario": case.scenario, "strategy": case.name,
        "policy": case.policy, "settings": dict(case.settings), "runs": len(found),
        "cpu_s": round(sum(t.cpu_s for t in found), 1), "to": {},
    }  # fmt: skip
    for k, target in enumerate(TARGETS[case.task]) if found else ():
        hours, nodes = sorted(t.hours[k] for t in found), sorted(t.node_hours[k] for t in found)
        shown["to"][f"{target:g}"] = {
            "reached": sum(math.isfinite(h) for h in hours),
            "hours": [_finite(quantile(hours, q)) for q in (0.5, 0.25, 0.75)],
            "node_hours": _finite(quantile(nodes, 0.5)),
        }
    return shown


def _finite(x: float) -> float | None:
    return round(x, 3) if math.isfinite(x) else None


def print_table(title: str, lines: Sequence[Line], scenarios: Sequence[str]) -> None:
    """Print hours (quartiles) and node-hours to the last target by scenario, in Markdown."""
    at = {(one["strategy"], one["scenario"]): one for one in lines if one["runs"]}
    names = dict.fromkeys(name for name, _ in at)
    print(f"\n{title}\n\n| | {' | '.join(scenarios)} |\n|---{'|---' * len(scenarios)}|")
    for name in sorted(names, key=lambda name: _order(at, name, scenarios)):
        print(f"| {name} | {' | '.join(_cell(at.get((name, s))) for s in scenarios)} |")


def print_ratios(
    title: str, lines: Sequence[Line], scenarios: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> None:
    """Print how many times as long the first of each pair takes as the second, by scenario."""
    at = {(one["strategy"], one["scenario"]): one for one in lines}
    print(f"\n{title}\n\n| | {' | '.join(scenarios)} |\n|---{'|---' * len(scenarios)}|")
    for one, other in pairs:
        ratios = [_ratio(at.get((one, s)), at.get((other, s))) for s in scenarios]
        print(f"| {one} over {other} | {' | '.join(ratios)} |")


def best_of(lines: Sequence[Line], scenario: str, without: Sequence[str]) -> str:
    """Return who was soonest at the last target in a scenario, of all but those."""
    mine = [one for one in lines if one["scenario"] == scenario and one["strategy"] not in without]
    return str(min(mine, key=lambda one: _hours(one) or math.inf)["strategy"]) if mine else ""


def _order(at: dict[tuple[str, str], Line], name: str, scenarios: Sequence[str]) -> float:
    hours = [_hours(at.get((name, s))) for s in scenarios]
    return sum(math.log(h) if h else math.log(1000.0) for h in hours)


def _last(one: Line | None) -> dict[str, Any]:
    return list(one["to"].values())[-1] if one and one["to"] else {}


def _hours(one: Line | None) -> float | None:
    found: float | None = _last(one).get("hours", [None])[0]
    return found


def _cell(one: Line | None) -> str:
    last, hours = _last(one), _hours(one)
    if one is None or hours is None:
        return f"- ({last['reached']}/{one['runs']})" if one else ""
    low, high = ("" if h is None else f"{h:.1f}" for h in last["hours"][1:])
    return f"{hours:.2f} ({low}-{high}), {last['node_hours']:.1f}"


def _ratio(one: Line | None, other: Line | None) -> str:
    over, under = _hours(one), _hours(other)
    return f"{over / under:.2f}" if over and under else "-"
