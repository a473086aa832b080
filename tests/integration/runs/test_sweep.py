"""A sweep through the whole command: real runs, one failure after the other, Ctrl-C, going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from worlds.jobs import until
from worlds.runs.run import ONE_SITE, ROOT

pytestmark = pytest.mark.slow

SETTINGS = [s for s in ONE_SITE if not s.startswith(("data.paths", "rounds", "train.steps"))]
GRID = ["data.paths.local_a=[json],[no_such_package]", "train.lr=1e-3,1e-2"]


def _command(tmp_path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with open(tmp_path / "out", "ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "flwr_hpc.run", *arguments],
            stdout=out, stderr=out, env=env, cwd=tmp_path, start_new_session=True,
        )  # fmt: skip


def _end(tmp_path: Path, process: subprocess.Popen[bytes]) -> tuple[int, str]:
    until(lambda: process.poll() is not None, tmp_path, explain=(tmp_path / "out").read_text)
    said = (tmp_path / "out").read_text()
    (tmp_path / "out").write_text("")
    return process.wait(), said


def _points(sweep: Path) -> list[dict[str, Any]]:
    body = json.loads((sweep / "sweep.json").read_text())
    points: list[dict[str, Any]] = body["points"]
    return points


def test_a_sweep_goes_on_where_it_was_and_past_what_fails(tmp_path: Path) -> None:
    """Protects the whole path: finished points stay, failed ones are told and not run again."""
    sweep = tmp_path / "sweep"
    command = ["-m", *SETTINGS, *GRID, "rounds=1", "train.steps=20", f"sweep.dir={sweep}"]
    first = _command(tmp_path, *command)
    second_point = "point 001  data.paths.local_a=[json] train.lr=0.01  started"
    until(
        lambda: second_point in (tmp_path / "out").read_text() or first.poll() is not None,
        tmp_path, explain=(tmp_path / "out").read_text,
    )  # fmt: skip
    first.send_signal(signal.SIGINT)
    code, said = _end(tmp_path, first)
    assert code == 130, said
    assert f"go on with: python -m flwr_hpc.run resume={sweep}" in said
    done, *rest = _points(sweep)
    assert done["status"] == "finished"
    assert all(one["status"] in ("waiting", "interrupted") for one in rest)
    written = (sweep / "000" / "run.log").stat().st_mtime_ns

    code, said = _end(tmp_path, _command(tmp_path, f"resume={sweep}", "sweep.parallel=2"))
    assert code == 0, said
    points = _points(sweep)
    assert [one["status"] for one in points] == ["finished", "finished", "failed", "failed"]
    assert (sweep / "000" / "run.log").stat().st_mtime_ns == written, "it was run again"
    assert "no_such_package" in points[2]["reason"]
    assert "sweep.retry_failed=true" in said
    for one in points[:2]:
        assert one["loss"] < 6
        assert min(one["train_s"], one["tokens_per_s"], one["peak_memory_gb"]) > 0
    assert any(one["pareto"] for one in points[:2])
    assert (sweep / "sweep.csv").read_text().startswith("point,data.paths.local_a,train.lr,status")

    code, said = _end(tmp_path, _command(tmp_path, *command))
    assert code == 0, said
    assert "4 of 4 points have ended before" in said
