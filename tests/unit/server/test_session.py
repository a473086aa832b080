"""What the command says at its end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flwr_hpc import run
from flwr_hpc.server.driver import SessionOutcome
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.session import _conclude


def test_a_finished_run_names_who_was_left_out(tmp_path: Path) -> None:
    """Protects the user from taking a model for one that all facilities have trained."""
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    reasons = {"a": {"excluded": None}, "b": {"excluded": "PBS refused the job: Unknown queue"}}
    folder.summary.write_text(json.dumps({"facilities": reasons}))
    out = io.StringIO()
    assert _conclude(Console(file=out), folder, SessionOutcome("finished")) == 0
    lines = out.getvalue().splitlines()
    assert "without b: PBS refused the job: Unknown queue" in lines
    assert not any(line.startswith("without a") for line in lines)


L405B = [
    *("model=llama3_70b", "model.config.hidden_size=16384", "model.config.num_hidden_layers=126"),
    *("model.config.intermediate_size=53248", "model.config.num_attention_heads=128"),
]


@pytest.mark.parametrize(
    ("model", "codec", "gb"),
    [
        (["model=llama3_1b"], "bf16", "2.47"),
        (["model=llama3_8b"], "int8", "8.06"),
        (["model=llama3_70b"], "int4", "37.5"),
        (["model=llama3_70b"], "[topk,int2]", "2.62"),
        (L405B, "[topk,int2]", "15.1"),
        (["model=llama3_8b"], "[bf16,zstd]", "at most 16.1"),
    ],
)
def test_a_dry_run_says_what_travels(
    model: list[str], codec: str, gb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects the table in docs/centres.md, and who pays for a line."""
    ways = [f"exchange.codec={codec}", f"exchange.downlink={codec}"]
    assert run.main([*model, *ways, "+facility=local_a", "dry_run=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(x.startswith("disk: at most") and "error feedback" in x for x in lines)
    line = next(x for x in lines if x.startswith("weights: "))
    assert f"brings {gb} GB to a site (exchange.downlink={codec}) and {gb} GB back" in line


def test_a_dry_run_of_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects what follows: without a shape the line is left out."""
    codec = "exchange.codec=worlds.exchange.codecs.Half"
    assert run.main(["+facility=local_a", "dry_run=true", codec]) == 0
    assert "weights: " not in capsys.readouterr().out


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
    folder = RunDir(tmp_path / "run")
    folder.model.mkdir(parents=True)
    (folder.model / file).write_text(json.dumps(content))
    out = io.StringIO()
    assert _conclude(Console(file=out), folder, SessionOutcome("finished")) == 0
    assert f"load the model with {loader}.from_pretrained" in out.getvalue()
