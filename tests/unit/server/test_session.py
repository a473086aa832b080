"""What the command says at its end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
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


@pytest.mark.parametrize(
    ("file", "content", "loader"),
    [
        ("config.json", {"is_encoder_decoder": True}, "AutoModelForSeq2SeqLM"),
        ("config.json", {}, "AutoModelForCausalLM"),
        ("adapter_config.json", {"task_type": "SEQ_2_SEQ_LM"}, "AutoPeftModelForSeq2SeqLM"),
        ("adapter_config.json", {"task_type": "CAUSAL_LM"}, "AutoPeftModelForCausalLM"),
    ],
)
def test_the_last_line_loads_the_model(
    tmp_path: Path, file: str, content: dict[str, object], loader: str
) -> None:
    """Protects the line that users copy: the class is the model's."""
    run = RunDir(tmp_path / "run")
    run.model.mkdir(parents=True)
    (run.model / file).write_text(json.dumps(content))
    out = io.StringIO()
    assert _conclude(Console(file=out), run, SessionOutcome("finished")) == 0
    assert f"load the model with {loader}.from_pretrained" in out.getvalue()
