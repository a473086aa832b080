"""What the command says at its end."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from flwr_hpc.server.driver import SessionOutcome
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.session import _conclude


def test_a_finished_run_names_who_was_left_out(tmp_path: Path) -> None:
    """Protects the user from taking a model for one that all facilities have trained."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    reasons = {"a": {"excluded": None}, "b": {"excluded": "PBS refused the job: Unknown queue"}}
    run.summary.write_text(json.dumps({"facilities": reasons}))
    out = io.StringIO()
    assert _conclude(Console(file=out), run, SessionOutcome("finished")) == 0
    lines = out.getvalue().splitlines()
    assert "without b: PBS refused the job: Unknown queue" in lines
    assert not any(line.startswith("without a") for line in lines)
