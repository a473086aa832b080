"""What every point of a sweep came to, and which of them are best."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr_hpc.errors import UserError
from flwr_hpc.files import publish, read_json
from flwr_hpc.sweep.folder import Point, SweepDir
from flwr_hpc.sweep.points import varied
from flwr_hpc.tracking.report.page import rebuild

JSON, CSV = "sweep.json", "sweep.csv"
KINDS = {
    "out of memory": re.compile(r"out of (?:\w+ )?memory|OUT_OF_MEMORY|oom", re.IGNORECASE),
    "diverged": re.compile(r"diverged"),
}


@dataclass(frozen=True)
class PointResult:
    """One point of a sweep, in numbers; None is not known."""

    name: str
    settings: dict[str, str]  # Those that are not the same in all points
    # ``waiting``, ``running``, ``interrupted``, ``finished``, ``failed``, ``out of memory`` or
    # ``diverged``.
    status: str
    reason: str = ""
    train_s: float | None = None  # In which the ranks trained; of the facility that took longest
    wall_s: float | None = None  # Of the whole run: queue, start, evaluation, transfers
    tokens_per_s: float | None = None  # Over all facilities
    loss: float | None = None  # Held-out loss of the last model, in nats per token
    peak_memory_gb: float | None = None  # The most any rank had
    mfu: float | None = None  # Percent, of the facility that uses its devices best
    node_hours: float | None = None
    pareto: bool = False  # No other point has both a lower loss and a shorter training

    @property
    def failed(self) -> bool:
        """Whether it has ended without a model."""
        return self.status in ("failed", *KINDS)


def collect(folder: SweepDir) -> list[PointResult]:
    """Read what every point came to."""
    points = folder.points()
    settings = varied([point.overrides for point in points])
    return mark_pareto([_result(folder, *pair) for pair in zip(points, settings, strict=True)])


def mark_pareto(results: Iterable[PointResult]) -> list[PointResult]:
    """Mark the points whose loss no other one reaches in as little training time."""
    results = list(results)
    found = [(r.train_s, r.loss) for r in results if r.status == "finished"]
    known = [(s, loss) for s, loss in found if s is not None and loss is not None]

    def best(one: PointResult) -> bool:
        if one.status != "finished" or one.train_s is None or one.loss is None:
            return False
        here = one.train_s, one.loss
        return not any(s <= here[0] and loss <= here[1] and (s, loss) != here for s, loss in known)

    return [dataclasses.replace(one, pareto=best(one)) for one in results]


def write(folder: SweepDir, results: Sequence[PointResult]) -> None:
    """Write ``sweep.json`` and ``sweep.csv``."""
    body = {"points": [dataclasses.asdict(one) for one in results]}
    publish(folder.path / JSON, json.dumps(body, indent=2, allow_nan=False) + "\n")
    publish(folder.path / CSV, as_csv(results))


def as_csv(results: Sequence[PointResult]) -> str:
    """Return a line per point: its settings, then its numbers."""
    numbers = [f.name for f in dataclasses.fields(PointResult)]
    numbers = [name for name in numbers if name not in ("name", "settings")]
    keys = list(results[0].settings) if results else []
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["point", *keys, *numbers])
    for one in results:
        settings = (one.settings[key] for key in keys)
        rows.writerow([one.name, *settings, *(getattr(one, name) for name in numbers)])
    return text.getvalue()


def _result(folder: SweepDir, point: Point, settings: dict[str, str]) -> PointResult:
    summary = _summary(folder.run_dir(point))
    sites = list((summary.get("facilities") or {}).values())
    hours = [site["node_hours"]["used"] for site in sites if site.get("node_hours")]
    return PointResult(
        name=point.name,
        settings=settings,
        status=_status(point, str(summary.get("status") or "waiting")),
        reason=point.reason,
        train_s=_most((site.get("seconds") or {}).get("train") for site in sites),
        wall_s=summary.get("wall_s"),
        tokens_per_s=sum(s for site in sites if (s := site.get("tokens_per_s"))) or None,
        loss=summary.get("held_out_loss_last"),
        peak_memory_gb=_most(site.get("peak_memory_gb") for site in sites),
        mfu=_most(site.get("mfu") for site in sites),
        node_hours=sum(hours) if hours else None,
    )


def _summary(run_dir: Path) -> Mapping[str, Any]:
    try:
        return rebuild(run_dir)
    except UserError:  # it has not begun
        return read_json(run_dir / "summary.json") or {}


def _status(point: Point, run: str) -> str:
    if point.code is None:
        return run
    if point.code == 0:
        return "finished"
    return next((kind for kind, said in KINDS.items() if said.search(point.reason)), "failed")


def _most(numbers: Iterable[float | None]) -> float | None:
    known = [n for n in numbers if n is not None and math.isfinite(n)]
    return max(known, default=None)
