"""Geometry of the report's charts: numbers in, pixel positions out. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr_hpc.tracking.report.lanes import Lane, Span
from flwr_hpc.tracking.text import duration
from flwr_hpc.tracking.timeline import PHASES

Point = tuple[float, float]
Tick = tuple[float, str]  # position in pixels, label

WIDTH, HEIGHT = 560.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 22.0, 12.0, 40.0
MAX_POINTS = 300  # of one curve; what is left out could not be seen
MAX_BANDS = 300  # of one facility, before its timeline is drawn in bins
BINS = 240
LABEL, LANE_WIDTH = 128.0, 1000.0
ROW, THIN, SPACE, SPLIT = 24.0, 16.0, 10.0, 3.0  # a lane alone, one of several, between them
TIME_STEPS = (
    *(1, 2, 5, 10, 15, 30),
    *(60 * n for n in (1, 2, 5, 10, 15, 30)),
    *(3600 * n for n in (1, 2, 3, 6, 12)),
    *(86400 * n for n in (1, 2, 5, 10, 20, 50, 100)),
)
TIME_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


@dataclass(frozen=True)
class Curve:
    """One line; `colour` counts the facilities, -1 is the global model."""

    name: str
    colour: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """A line chart in pixels; the ranges let the page turn a position back into numbers."""

    x_label: str
    x_unit_s: float
    x_range: Point
    y_range: Point
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[tuple[str, int, str]]  # name, colour, "x,y x,y ..."
    note: str = ""
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Band:
    """Part of a lane: a rectangle of one phase."""

    x: float
    y: float
    width: float
    height: float
    phase: str
    tip: str = ""


@dataclass(frozen=True)
class Row:
    """A facility: a lane for each allocation that lived at the same time."""

    name: str
    y: float
    height: float
    bands: list[Band]
    marks: list[tuple[float, str, str]]


@dataclass(frozen=True)
class Gantt:
    """The timeline in pixels: a row per facility."""

    width: float
    height: float
    left: float
    x_label: str
    ticks: list[Tick]
    rows: list[Row]
    sessions: list[float]


def line_chart(x_label: str, curves: Iterable[Curve], *, time: bool = False) -> Chart | None:
    """Lay out curves over one x axis, in seconds of the run if `time`; None without a point."""
    curves = [Curve(c.name, c.colour, thin(c.points)) for c in curves if c.points]
    xs = [x for c in curves for x, _ in c.points]
    ys = [y for c in curves for _, y in c.points]
    if not xs:
        return None
    x0, x1 = min(0.0, *xs), max(xs)
    x1 = x1 if x1 > x0 else x0 + 1
    top, cut = _ceiling(ys)
    y_step = nice_step((top - min(ys)) or 1.0, 5)
    y0 = math.floor(min(ys) / y_step) * y_step
    y1 = math.ceil(top / y_step) * y_step
    y1 = y1 if y1 > y0 else y0 + y_step
    unit_s = 1.0
    if time:
        x_values, unit_s, unit = time_ticks(x1)
        x_label = f"{x_label} ({unit})"
    else:
        x_values = steps_between(x0, x1, max(1.0, nice_step(x1 - x0, 6)))

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)

    return Chart(
        x_label,
        unit_s,
        (x0, x1),
        (y0, y1),
        [(round(px(x), 2), number(x / unit_s)) for x in x_values],
        [(round(py(y), 2), number(y)) for y in steps_between(y0, y1, y_step)],
        [
            (c.name, c.colour, " ".join(f"{px(x):.2f},{py(y):.2f}" for x, y in c.points))
            for c in curves
        ],
        f"values above {number(y1)} are cut off" if cut else "",
    )


def _ceiling(ys: Sequence[float]) -> tuple[float, bool]:
    """Return the largest value to show, and whether larger ones are cut off.

    A long run is flat compared to its first moments; then those give way.
    """
    low, high = min(ys), max(ys)
    most = sorted(ys)[int(0.97 * (len(ys) - 1))]
    if len(ys) < 100 or most - low > 0.4 * (high - low):
        return high, False
    return low + 1.3 * (most - low), True


def gantt(
    rows: Iterable[tuple[str, Sequence[Lane], Sequence[tuple[float, str, str]]]],
    end_s: float,
    sessions: Iterable[float] = (),
) -> Gantt | None:
    """Lay out the timelines of facilities (name, lanes, marks); None if nothing was done."""
    rows = list(rows)
    phases = {span[2] for _, lanes, _ in rows for lane in lanes for span in lane}
    if end_s <= 0 or phases <= {"idle"}:
        return None
    scale = LANE_WIDTH / end_s
    laid, y = [], 6.0
    for name, lanes, marks in rows:
        height = ROW if len(lanes) <= 1 else THIN
        bands = [
            band
            for i, lane in enumerate(lanes)
            for band in _lane(lane, end_s, y + i * (height + SPLIT), height)
        ]
        whole = max(1, len(lanes)) * (height + SPLIT) - SPLIT
        shown = [(round(LABEL + s * scale, 1), kind, why) for s, kind, why in marks]
        laid.append(Row(name, y, whole, bands, shown))
        y += whole + SPACE
    values, unit_s, unit = time_ticks(end_s, 10)
    return Gantt(
        LABEL + LANE_WIDTH + 16,
        y + 38,
        LABEL,
        f"time of the run ({unit})",
        [(round(LABEL + s * scale, 1), number(s / unit_s)) for s in values],
        laid,
        [round(LABEL + s * scale, 1) for s in sessions],
    )


def _lane(lane: Lane, end_s: float, y: float, height: float) -> list[Band]:
    draw = _bands if len(lane) <= MAX_BANDS else _bins
    return draw(lane, end_s, y, height)


def _bands(lane: Sequence[Span], end_s: float, y: float, height: float) -> list[Band]:
    scale = LANE_WIDTH / end_s
    return [
        Band(
            round(LABEL + start * scale, 2),
            y,
            max(0.3, round((end - start) * scale, 2)),
            height,
            phase,
            f"{name} {phase}: {duration(end - start)}, from {duration(start)}".lstrip(),
        )
        for start, end, phase, name in lane
    ]


def _bins(lane: Sequence[Span], end_s: float, y: float, height: float) -> list[Band]:
    """Return stacked shares of the phases: many short intervals would hide each other."""
    step = end_s / BINS
    shares = [dict.fromkeys(PHASES, 0.0) for _ in range(BINS)]
    for start, end, phase, _ in lane:
        for k in range(int(start / step), min(BINS, int(end / step) + 1)):
            shares[k][phase] += max(0.0, min(end, (k + 1) * step) - max(start, k * step))
    width = LANE_WIDTH / BINS
    bands: list[Band] = []
    for k, share in enumerate(shares):
        bottom = y + height
        tip = ", ".join(f"{p} {v / step:.0%}" for p, v in share.items() if v > 0.005 * step)
        for phase in reversed(PHASES):
            part = height * share[phase] / step
            if part >= 0.1:
                bottom -= part
                x = round(LABEL + k * width, 2)
                band = Band(x, round(bottom, 2), width + 0.4, round(part, 2), phase, tip)
                bands.append(band)
    return bands


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Return at most about `limit` points: the first, then means over neighbours."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil((len(points) - 1) / (limit - 1))
    groups = [points[i : i + size] for i in range(1, len(points), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means]


def nice_step(span: float, ticks: int) -> float:
    """Return 1, 2 or 5 times a power of ten that cuts `span` into about `ticks` parts."""
    power = 10.0 ** math.floor(math.log10(span / ticks))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= span / ticks * 0.999)


def time_ticks(end_s: float, ticks: int = 6) -> tuple[list[float], float, str]:
    """Return tick positions in seconds, and the unit (its seconds and name) to label them in."""
    if end_s < ticks:
        step = nice_step(end_s, ticks)
    else:
        step = next((t for t in TIME_STEPS if end_s / t <= ticks), TIME_STEPS[-1] * 10)
    unit_s, unit = next((u for u in TIME_UNITS if step >= u[0]), TIME_UNITS[-1])
    return steps_between(0.0, end_s, step), float(unit_s), unit


def steps_between(low: float, high: float, step: float) -> list[float]:
    """Return the multiples of `step` from `low` to `high`."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def number(value: float) -> str:
    """Return a tick label without needless digits."""
    return f"{value:.6g}" if abs(value) < 1e4 else f"{value / 1000:.6g}k"
