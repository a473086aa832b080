"""A sweep's table and plots."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from flwr_hpc.sweep.folder import SweepDir
from flwr_hpc.sweep.points import short
from flwr_hpc.sweep.results import PointResult, collect, write
from flwr_hpc.tracking.text import compact, duration

PLOTS = "sweep.png"
NOTHING = "–"  # noqa: RUF001
NUMBERS = ("train", "wall", "tokens/s", "loss", "peak memory", "MFU")


def report(folder: SweepDir, console: Console) -> None:
    """Write ``sweep.json``, ``sweep.csv`` and ``sweep.png`` of a sweep; print its table."""
    results = collect(folder)
    write(folder, results)
    console.print(table(results))
    for one in results:
        if one.reason:
            _print(console, f"{one.name} {one.status}: {one.reason} ({folder.path / one.name})")
    if find_spec("matplotlib") is None:
        _print(console, "no plots: they need matplotlib. pip install 'flwr-hpc[simulate]'")
    elif any(one.status == "finished" for one in results):
        from flwr_hpc.sweep.plots import draw  # later: matplotlib takes a second

        draw(folder.path / PLOTS, results)
        _print(console, f"plots: {folder.path / PLOTS}")


def table(results: Sequence[PointResult]) -> Table:
    """Return a row per point; ``*`` marks the Pareto front of loss against training time.

    In a narrow terminal the headings are wrapped, and no number is cut.
    """
    title = "sweep (* no other point has both a lower loss and a shorter training)"
    made = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    keys = list(results[0].settings) if results else []
    headings = ["point", *(name.replace("_", " ") for name in short(keys)), *NUMBERS, ""]
    rows = [
        [one.name, *(one.settings[key] for key in keys), *_numbers(one), _mark(one)]
        for one in results
    ]
    if all(one.mfu is None for one in results):  # of no GPU that is known
        for row in (headings, *rows):
            del row[-2]
    for at, heading in enumerate(headings):
        widest = max((len(row[at]) for row in rows), default=0)
        justify: Literal["right", "left"] = "right" if heading in NUMBERS else "left"
        made.add_column(heading, justify=justify, min_width=widest, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def _numbers(one: PointResult) -> list[str]:
    return [
        duration(one.train_s) if one.train_s is not None else NOTHING,
        duration(one.wall_s) if one.wall_s is not None else NOTHING,
        compact(one.tokens_per_s),
        f"{one.loss:.4f}" if one.loss is not None else NOTHING,
        f"{one.peak_memory_gb:.2f} GB" if one.peak_memory_gb is not None else NOTHING,
        f"{one.mfu:.1f} %" if one.mfu is not None else NOTHING,
    ]


def _mark(one: PointResult) -> str:
    if one.status == "finished":
        return "*" if one.pareto else ""
    return one.status


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)
