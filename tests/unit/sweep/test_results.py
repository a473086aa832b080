"""A sweep's table: every point with its numbers, the front marked, failures shown."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flwr_hpc import report
from flwr_hpc.sweep.folder import SweepDir
from flwr_hpc.sweep.results import PointResult, as_csv, collect, mark_pareto
from flwr_hpc.sweep.show import table


def _point(
    name: str, train_s: float | None, loss: float | None, status: str = "finished"
) -> PointResult:
    return PointResult(name, {"train.lr": name}, status, train_s=train_s, loss=loss)


def test_the_front_of_loss_against_time() -> None:
    """Protects the marks: by hand, with equal points, and one that failed fast and low."""
    results = mark_pareto([
        _point("slow and good", 10.0, 1.0),
        _point("fast and bad", 1.0, 3.0),
        _point("between", 5.0, 2.0),
        _point("worse than between", 6.0, 2.5),
        _point("as good but slower", 11.0, 1.0),
        _point("twin", 5.0, 2.0),
        _point("failed", 0.1, 0.1, "diverged"),
        _point("unknown", None, None),
    ])  # fmt: skip
    front = {one.name for one in results if one.pareto}
    assert front == {"slow and good", "fast and bad", "between", "twin"}


def _run(folder: Path, loss: float, train_s: float) -> None:
    """Write the event log of a finished run at one facility."""
    metrics = {"train_loss": loss, "tokens_per_s": 500.0, "peak_memory_gb": 1.5}
    facility = {"facility": "a"}
    events = [
        {"event": "run_started", "run_key": "r", "strategy": "s", "rounds": 1, "facilities": ["a"],
         "version": 0, "resumed": False},
        {"event": "order_sent", "order_id": "1", "kind": "train", "version": 0, "steps": 2,
         **facility},
        {"event": "order_done", "order_id": "1", "kind": "train", "version": 0, "steps": 2,
         "tokens": 10, "metrics": metrics, "seconds": {"train": train_s}, **facility},
        {"event": "order_sent", "order_id": "2", "kind": "evaluate", "version": 1, "steps": 0,
         **facility},
        {"event": "order_done", "order_id": "2", "kind": "evaluate", "version": 1,
         "metrics": {"held_out_loss": loss, "peak_memory_gb": 1.2}, "seconds": {}, **facility},
        {"event": "run_finished", "status": "finished", "error": ""},
    ]  # fmt: skip
    folder.mkdir(parents=True)
    lines = [json.dumps({"t": 100.0 + i, "s": float(i), **e}) for i, e in enumerate(events)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")


def _sweep(tmp_path: Path) -> SweepDir:
    folder = SweepDir(tmp_path / "sweep")
    points = folder.add([["train.lr=1"], ["train.lr=2"], ["train.lr=3"]], None)
    _run(folder.run_dir(points[0]), 2.5, 3.0)
    folder.end(points[0], 0)
    folder.end(points[1], 1, "a GPU ran out of memory: CUDA error")
    return folder


def test_every_point_is_in_the_table_failed_ones_too(tmp_path: Path) -> None:
    """Protects the numbers of a run on their way into the sweep's table, JSON and CSV."""
    first, second, third = results = collect(_sweep(tmp_path))
    assert (first.status, first.loss, first.tokens_per_s) == ("finished", 2.5, 500.0)
    assert (first.peak_memory_gb, first.mfu, first.pareto) == (1.5, None, True)
    assert (second.status, second.loss, second.failed) == ("out of memory", None, True)
    assert (third.status, third.failed) == ("waiting", False)
    rows = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert [(r["point"], r["train.lr"], r["status"]) for r in rows] == [
        ("000", "1", "finished"), ("001", "2", "out of memory"), ("002", "3", "waiting"),
    ]  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(results))
    text = console.export_text()
    assert "out of memory" in text
    (line,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["000"])
    assert line[-4:] == ["2.5000", "1.50", "GB", "*"]


def test_report_of_a_sweep_writes_what_machines_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects ``python -m flwr_hpc.report SWEEP_DIR``."""
    folder = _sweep(tmp_path)
    assert report.main([str(folder.path)]) == 0
    told = capsys.readouterr().out
    assert "001 out of memory: a GPU ran out of memory: CUDA error" in told
    body = json.loads((folder.path / "sweep.json").read_text())
    assert [p["status"] for p in body["points"]] == ["finished", "out of memory", "waiting"]
    assert (folder.path / "sweep.csv").read_text().count("\n") == 4
    if "no plots" not in told:
        assert (folder.path / "sweep.png").stat().st_size > 0
