"""report.html: one self-contained page about a run, and summary.json beside it.

The charts are inline SVG, the page loads nothing from anywhere, and it reads without scripts;
a few lines of JavaScript add tooltips.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from flwr_hpc.errors import UserError
from flwr_hpc.files import publish, read_json
from flwr_hpc.tracking.events import FILE_NAME, read
from flwr_hpc.tracking.records import FacilityState, RunState
from flwr_hpc.tracking.redact import redact_text
from flwr_hpc.tracking.report.charts import Chart, Curve, Gantt, gantt, line_chart
from flwr_hpc.tracking.report.lanes import lanes
from flwr_hpc.tracking.report.summary import summarize
from flwr_hpc.tracking.state import fold_all
from flwr_hpc.tracking.text import compact, duration, hours
from flwr_hpc.tracking.timeline import PHASES

REPORT, SUMMARY = "report.html", "summary.json"
MAX_MARKS = 200
PHASE_NAMES = {
    "queue": "queue",
    "startup": "start-up",
    "load": "load",
    "train": "train",
    "evaluate": "evaluate",
    "transfer": "transfer",
    "idle": "idle",
}


def rebuild(run_dir: Path) -> dict[str, Any]:
    """Write ``report.html`` and ``summary.json`` of a run from its event log.

    What an earlier ``summary.json`` says and the log does not is kept.

    Returns
    -------
    dict
        The summary.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(
            f"no run directory at '{run_dir}'. Give the folder that a run printed as its last "
            "line: python -m flwr_hpc.report runs/DATE_TIME"
        )
    try:
        state = fold_all(read(run_dir / FILE_NAME))
    except FileNotFoundError:
        raise UserError(_not_a_run(run_dir)) from None
    if state.status == "unknown" and not state.facilities:
        raise UserError(f"'{run_dir / FILE_NAME}' holds no event of a run: nothing to report")
    return write(run_dir, state)


def write(run_dir: Path, state: RunState, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write ``summary.json`` and ``report.html`` of a run and return the summary.

    Parameters
    ----------
    run_dir : Path
    state : RunState
    extra : dict, optional
        Further keys of the summary; ``model`` is found by itself in the run directory.
    """
    summary = summarize(state, {"model": _model(run_dir), **(extra or {})})
    for key, value in _earlier(run_dir / SUMMARY).items():
        if summary.get(key) is None and (key == "model" or key not in summary):
            summary[key] = value
    publish(run_dir / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    config = run_dir / "config.yaml"
    text = config.read_text() if config.is_file() else ""
    publish(run_dir / REPORT, render(state, summary, run_dir.resolve().name, text))
    return summary


def render(state: RunState, summary: Mapping[str, Any], name: str, config: str = "") -> str:
    """Return the page; secrets in the configuration are masked."""
    marks = sorted((s, f.name, k, why) for f in state.facilities.values() for s, k, why in f.marks)
    spent = [f["node_hours"] for f in summary["facilities"].values() if f["node_hours"]]
    timeline = _timeline(state)
    template = _environment().get_template("report.html.j2")
    return template.render(
        title=f"Run {name}",
        subtitle=_subtitle(state),
        summary=summary,
        facts=_facts(state, summary),
        facilities=list(state.facilities),
        charts=_charts(state),
        timeline=timeline,
        overlap=timeline is not None and len({row.height for row in timeline.rows}) > 1,
        from_ledger=sum(one["from_ledger"] for one in spent),
        rows=[
            {"name": n, "tokens_per_s": state.facilities[n].tokens_per_s, **row}
            for n, row in summary["facilities"].items()
        ],
        marks=marks[-MAX_MARKS:],
        more_marks=max(0, len(marks) - MAX_MARKS),
        phases=PHASES,
        phase_names=PHASE_NAMES,
        config=redact_text(config),
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"compact": compact, "duration": duration, "hours": hours}
    return environment


def _subtitle(state: RunState) -> str:
    parts = [state.strategy, f"{len(state.facilities)} facilities"]
    if len(state.facilities) == 1:
        parts[1] = f"one facility, {next(iter(state.facilities))}"
    if state.started_t is not None:
        start = dt.datetime.fromtimestamp(state.started_t, dt.UTC)
        parts.append(f"started {start:%Y-%m-%d %H:%M} UTC")
    if len(state.sessions) > 1:
        again = len(state.sessions) - 1
        parts.append("resumed once" if again == 1 else f"resumed {again} times")
    return " · ".join(p for p in parts if p)


def _facts(state: RunState, summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, value and note of the numbers on top."""
    first, last = summary["held_out_loss_first"], summary["held_out_loss_last"]
    loss = "–" if last is None else f"{first:.3f} → {last:.3f}"  # noqa: RUF001
    tokens = sum(f.tokens for f in state.facilities.values())
    steps = sum(f.steps for f in state.facilities.values())
    seconds = [f.accounted() for f in state.facilities.values()]
    total = sum(sum(s.values()) for s in seconds)
    work = sum(s["train"] + s["evaluate"] for s in seconds)
    rate = tokens / state.wall_s if state.wall_s > 0 else 0.0
    return [
        (
            "Held-out loss",
            loss,
            "" if last is None else f"nats per token; perplexity {compact(_perplexity(last))}",
        ),
        ("Global versions", str(state.version), f"{state.rounds_done} of {state.rounds} rounds"),
        ("Time", duration(state.wall_s), f"{compact(rate)} tokens/s over all"),
        ("Tokens trained", compact(tokens), f"{steps:,} optimizer steps"),
        (
            "Computing",
            f"{work / total:.0%}" if total else "–",  # noqa: RUF001
            "of the time from job handed in to its end",
        ),
        *_inexactness(summary),
        *_node_hours(summary),
    ]


def _inexactness(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = summary["lora_inexactness"]
    if not found:
        return []
    name, note = "LoRA inexactness", "of the product of averaged A and B, against the average BA"
    if "last" not in found:
        return [(name, "–", found["unknown"])]  # noqa: RUF001
    note += f"; mean {found['mean']:.2%}, most {found['max']:.2%}"
    if "removed" in found:
        note += f"; {found['removed']:.2%} in the mean without the strategy's residual"
    return [(name, f"{found['last']:.2%}", note)]


def _node_hours(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    spent = [f["node_hours"] for f in summary["facilities"].values() if f["node_hours"]]
    if not spent:
        return []
    used, idle, lost = (sum(one[key] for one in spent) for key in ("used", "idle", "lost"))
    return [("Node-hours", hours(used), f"{hours(idle)} idle, {hours(lost)} lost")]


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None


def _charts(state: RunState) -> list[tuple[Chart | None, str]]:
    everyone = list(enumerate(state.facilities.values()))
    whole = state.held_out_curve() if len(everyone) > 1 else []

    def held_out(x: int) -> list[Curve]:
        curves = [_curve(f, i, f.held_out_curve, x) for i, f in everyone]
        return [Curve("global", -1, [(p[x], p[2]) for p in whole]), *curves]

    def train(x: int) -> list[Curve]:
        return [_curve(f, i, f.train_loss, x) for i, f in everyone]

    errors = [
        Curve(f.name, i, [(n, error) for n, _, error in f.encoded if error is not None])
        for i, f in everyone
    ]
    codec = line_chart("orders of the facility", errors) if any(c.points for c in errors) else None
    left_out = (codec, "Share of the update that the codec left out, by order")
    return [
        (line_chart("version", held_out(1)), "Held-out loss by version of the global model"),
        (line_chart("time of the run", held_out(0), time=True), "Held-out loss by time"),
        (line_chart("optimizer steps", train(1)), "Training loss by steps of the facility"),
        (line_chart("time of the run", train(0), time=True), "Training loss by time"),
        *([left_out] if codec else []),
    ]


def _curve(f: FacilityState, i: int, points: list[tuple[float, int, float]], x: int) -> Curve:
    return Curve(f.name, i, [(p[x], p[2]) for p in points])


def _timeline(state: RunState) -> Gantt | None:
    end = state.wall_s
    rows = [(f.name, lanes(state, f, end), f.marks) for f in state.facilities.values()]
    return gantt(rows, end, state.sessions[1:])


def _model(run_dir: Path) -> str | None:
    """Return where the trained model lies, if it was written."""
    folder = run_dir.resolve() / "model"
    whole = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    return str(folder) if any((folder / name).is_file() for name in whole) else None


def _earlier(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except ValueError:  # not ours, or torn by hand: replaced
        return {}


def _not_a_run(folder: Path) -> str:
    message = f"'{folder}' has no {FILE_NAME}: it is not a run directory, or its run never began."
    try:
        inside = sorted(p.parent for p in folder.glob(f"*/{FILE_NAME}"))
    except OSError:
        inside = []
    if inside:
        message += f" The newest run in it: python -m flwr_hpc.report {inside[-1]}"
    return message
