"""Findings for people (a table, or lines where nobody sees a table) and for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flwr_hpc import __version__
from flwr_hpc.doctor.findings import NEEDS, Finding
from flwr_hpc.plan.bandwidth import MeasuredBandwidths

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


def show(console: Console, facility: str, findings: Sequence[Finding]) -> None:
    """Print the findings of one place at a facility."""
    if not findings:
        return
    findings = _gathered(findings)
    title = f"{facility}, {findings[0].where}"
    if not console.is_terminal:
        _lines(console, title, findings)
        return
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("check", no_wrap=True)
    table.add_column("")
    table.add_column("found, and what to do about it", ratio=1, overflow="fold")
    for f in findings:
        told = Text(f.observed)
        if f.fix:
            told.append(f"\n-> {f.fix}", style=COLOURS[f.status])
        table.add_row(Text(f.name), Text(f.status, style=COLOURS[f.status]), told)
    console.print(table)


def _gathered(findings: Sequence[Finding]) -> list[Finding]:
    """Put the checks that were skipped for want of another one into one row."""
    idle = [f for f in findings if f.status == "skipped" and f.observed.startswith(NEEDS)]
    rest = [f for f in findings if f not in idle]
    if len(idle) < 3:
        return list(findings)
    names = ", ".join(f.name for f in idle)
    return [*rest, replace(idle[0], name=f"{len(idle)} more checks", observed=names)]


def _lines(console: Console, title: str, findings: Sequence[Finding]) -> None:
    lines = [title]
    for f in findings:
        told = f.observed.replace("\n", "\n" + 10 * " ")
        lines.append(f"  {f.status:8}{f.name}: {told}")
        if f.fix:
            lines.append(f"          -> {f.fix}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def show_bandwidths(console: Console, measured: MeasuredBandwidths, path: Path) -> None:
    """Print what collectives reached, and where that is kept."""
    table = Table(
        title=f"{measured.facility}, GB/s through each rank", title_justify="left", box=None,
        pad_edge=False,
    )  # fmt: skip
    columns = ("inner", "size", "all-gather", "reduce-scatter", "all-reduce", "in plans")
    for name in columns:
        table.add_column(name, justify="right")
    for row in measured.rows:
        speeds = row.all_gather, row.reduce_scatter, row.all_reduce, row.gb_s
        table.add_row(str(row.inner), str(row.size), *(f"{speed:.3g}" for speed in speeds))
    console.print(table)
    console.print(
        f"Measured {measured.origin}, with all groups of a kind at work. Kept in {path}: "
        "python -m flwr_hpc.plan goes by it from now on.",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def verdict(findings: Mapping[str, Sequence[Finding]]) -> str:
    """Return how many checks failed, in one line."""
    everything = [f for here in findings.values() for f in here]
    counts = {s: sum(f.status == s for f in everything) for s in COLOURS}
    words = {"pass": "passed", "warn": "warned", "fail": "failed", "skipped": "skipped"}
    return ", ".join(f"{n} {words[s]}" for s, n in counts.items() if n)


def as_json(findings: Mapping[str, Sequence[Finding]]) -> str:
    """Return everything as one JSON object."""
    body = {
        "flwr_hpc": __version__,
        "ok": not any(f.status == "fail" for here in findings.values() for f in here),
        "facilities": {name: [asdict(f) for f in here] for name, here in findings.items()},
    }
    return json.dumps(body, indent=1)
