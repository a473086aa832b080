"""What comes of the runs: medians and quartiles, as lines for JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from runs import TARGETS, Case, Times

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


def print_table(
    title: str, lines: Sequence[Line], scenarios: Sequence[str], reference: str
) -> None:
    """Print hours, quartiles, node-hours, and how much sooner than the reference, by scenario."""
    shown = Table(title=title, title_justify="left", box=None)
    shown.add_column("strategy", no_wrap=True)
    for scenario in scenarios:
        shown.add_column(scenario, no_wrap=True)
    names = dict.fromkeys(one["strategy"] for one in lines)
    at = {(one["strategy"], one["scenario"]): one for one in lines}
    for name in sorted(names, key=lambda name: _order(at, name, scenarios)):
        base = [at.get((reference, s)) for s in scenarios]
        mine = [at.get((name, s)) for s in scenarios]
        shown.add_row(name, *(_cell(m, b) for m, b in zip(mine, base, strict=True)))
    Console(width=220).print(shown)


def _order(at: dict[tuple[str, str], Line], name: str, scenarios: Sequence[str]) -> float:
    hours = [_hours(at.get((name, s))) for s in scenarios]
    return sum(math.log(h) if h else math.log(1000.0) for h in hours)


def _last(one: Line | None) -> dict[str, Any]:
    return list(one["to"].values())[-1] if one and one["to"] else {}


def _hours(one: Line | None) -> float | None:
    found: float | None = _last(one).get("hours", [None])[0]
    return found


def _cell(one: Line | None, base: Line | None) -> str:
    last, hours, reference = _last(one), _hours(one), _hours(base)
    if not last:
        return ""
    if one is None or hours is None:
        return f"- ({last['reached']}/{one['runs'] if one else 0})"
    low, high = (f"{h:.1f}" if h is not None else "" for h in last["hours"][1:])
    ratio = f" x{reference / hours:.1f}" if reference else ""
    return f"{hours:.2f} ({low}-{high}), {last['node_hours']:.1f}{ratio}"
