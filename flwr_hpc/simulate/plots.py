"""Pictures of a comparison, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from flwr_hpc.simulate.federation import RunOutcome

COLOURS = {"queue": "#d9d9d9", "load": "#fdb462", "train": "#4daf4a", "idle": "#fb8072"}


def draw(out: Path, outcomes: Sequence[RunOutcome]) -> list[Path]:
    """Write ``loss.png`` and ``timelines.png``; return their paths."""
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return [_losses(out / "loss.png", outcomes), _timelines(out, outcomes)]


def _losses(path: Path, outcomes: Sequence[RunOutcome]) -> Path:
    """Loss against wall-clock and against node-hours; a thin line per seed."""
    names = list(dict.fromkeys(o.strategy for o in outcomes))
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column, label in ((axes[0], 0, "hours"), (axes[1], 1, "node-hours")):
        for outcome in outcomes:
            colour = f"C{names.index(outcome.strategy) % 10}"
            first = outcome.seed == min(o.seed for o in outcomes if o.strategy == outcome.strategy)
            xs = [point[column] for point in outcome.curve]
            ys = [point[2] for point in outcome.curve]
            width = 1.6 if first else 0.7
            axis.plot(xs, ys, colour, lw=width, label=outcome.strategy if first else None)
        axis.axhline(outcomes[0].target, color="black", lw=0.8, ls=":")
        axis.set_xlabel(label)
    axes[0].set_ylabel("held-out loss (nats per token)")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path


def _timelines(out: Path, outcomes: Sequence[RunOutcome]) -> Path:
    """What every site's allocations did, for the first seed of each strategy."""
    seed = min(o.seed for o in outcomes)
    shown = [o for o in outcomes if o.seed == seed]
    longest = max(o.hours for o in shown)
    figure = Figure(figsize=(11, 0.8 + 1.5 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, outcome in zip(axes, shown, strict=True):
        _timeline(axis, outcome)
        axis.set_xlim(0, longest)
    axes[-1].set_xlabel("hours")
    handles = [mpl.patches.Patch(color=c, label=name) for name, c in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False)
    path = out / "timelines.png"
    figure.savefig(path, dpi=130)
    return path


def _timeline(axis: Any, outcome: RunOutcome) -> None:
    sites = list(outcome.segments)
    for row, site in enumerate(sites):
        for segment in outcome.segments[site]:
            begin, length = segment.begin / 3600.0, (segment.end - segment.begin) / 3600.0
            lane = int(segment.allocation[1:]) % 2  # a successor beside its predecessor
            y = row - 0.4 + 0.4 * lane
            axis.broken_barh([(begin, length)], (y, 0.36), color=COLOURS[segment.what])
    axis.set_yticks(range(len(sites)), sites)
    axis.invert_yaxis()
    axis.set_title(f"{outcome.strategy}, {outcome.hours:.1f} h", loc="left")
