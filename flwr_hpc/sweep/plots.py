"""Pictures of a sweep, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from flwr_hpc.sweep.points import short
from flwr_hpc.sweep.results import PointResult


def draw(path: Path, results: Sequence[PointResult]) -> None:
    """Write one picture: loss against time, loss by the settings, speed and memory by point."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 8), layout="constrained")
        axes = figure.subplots(2, 2)
        _front(axes[0, 0], results)
        _losses(axes[0, 1], results)
        _bars(axes[1, 0], results, "tokens_per_s", "tokens/s")
        _bars(axes[1, 1], results, "peak_memory_gb", "peak memory (GB)")
        figure.savefig(path, dpi=130)


def _front(axis: Any, results: Sequence[PointResult]) -> None:
    known = [one for one in results if one.status == "finished" and one.train_s and one.loss]
    front = sorted((one.train_s or 0.0, one.loss or 0.0) for one in known if one.pareto)
    if front:
        axis.plot(*zip(*front, strict=True), color="C1", lw=1, label="Pareto front")
        axis.legend(frameon=False)
    for one in known:
        axis.plot(one.train_s, one.loss, "o", color="C1" if one.pareto else "C0")
        axis.annotate(one.name, (one.train_s, one.loss), (4, 4), textcoords="offset points")
    axis.set_xlabel("training time (s)")
    axis.set_ylabel("held-out loss (nats per token)")


def _losses(axis: Any, results: Sequence[PointResult]) -> None:
    """Loss by the first setting that is a number, a line for each choice of the others."""
    keys = list(results[0].settings)
    key = next((k for k in keys if all(_number(one.settings[k]) for one in results)), None)
    if key is None:
        _bars(axis, results, "loss", "held-out loss (nats per token)")
        return
    names = dict(zip(keys, short(keys), strict=True))
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in results:
        others = " ".join(f"{names[k]}={one.settings[k]}" for k in keys if k != key)
        if one.loss is not None and one.status == "finished":
            lines.setdefault(others, []).append((float(one.settings[key]), one.loss))
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", lw=1, label=name)
    values = [float(one.settings[key]) for one in results]
    if min(values) > 0 and max(values) >= 4 * min(values):
        axis.set_xscale("log")
    axis.set_xlabel(key)
    axis.set_ylabel("held-out loss (nats per token)")
    if any(lines):
        axis.legend(frameon=False)


def _bars(axis: Any, results: Sequence[PointResult], field: str, label: str) -> None:
    """Draw a bar for each point; a failed one has its reason instead."""
    for row, one in enumerate(results):
        value = getattr(one, field)
        if one.failed:
            axis.text(0, row, f" {one.status}", va="center", color="C3")
        elif value is not None:
            axis.barh(row, value, color="C1" if one.pareto else "C0")
    names = [f"{one.name}  {' '.join(one.settings.values())}" for one in results]
    axis.set_yticks(range(len(results)), names)
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.set_xlabel(label)


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
