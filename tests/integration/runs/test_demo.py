"""The demo, as a new user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from worlds.runs.run import ROOT, Run


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path) -> None:
    """Protects the demo's promise: the global model learns both facilities' data."""
    done = subprocess.run(
        [sys.executable, "-m", "flwr_hpc.run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    summary = Run.summary_of(run_dir)
    sent = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "weights_sent" for e in sent) >= summary["versions"]
    for site in summary["facilities"].values():
        assert site["held_out_loss_last"] < site["held_out_loss_first"]
        assert site["held_out_loss_last"] < 2.1
