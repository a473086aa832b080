"""The small files that a site sends for the model's folder."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from safetensors.numpy import load_file

from flwr_hpc.server import model_dir, server_app
from flwr_hpc.server.model_dir import (
    base_options,
    publish_files,
    set_factors_apart,
    write_model,
)
from flwr_hpc.server.run_dir import RunDir


def test_files_of_a_model_are_written(tmp_path):
    """What transformers needs beside the weights."""
    publish_files(tmp_path, {"config.json": "{}", "tokenizer.json": "[]"})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "config.json": "{}",
        "tokenizer.json": "[]",
    }


@pytest.mark.parametrize(
    "name",
    [
        "modeling_evil.py",
        "../config.json",
        "/etc/passwd",
        "sub/config.json",
        "model.safetensors",
        "pytorch_model.bin",
        ".netrc",
        "config.json\n",
        "",
    ],
)
def test_anything_else_is_left_out(tmp_path, name):
    """Code would be run by who loads the model, and no path leads elsewhere."""
    folder = tmp_path / "model"
    publish_files(folder, {name: "x", "config.json": "{}"})
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["config.json"]


def test_a_file_that_is_too_large_is_left_out(tmp_path, monkeypatch):
    """A site's word must not fill the server's disk; odd characters are no reason to fail."""
    monkeypatch.setattr(model_dir, "MOST_BYTES", 10)
    publish_files(tmp_path, {"vocab.txt": "x" * 11, "merges.txt": "\ud800"})
    assert [p.name for p in tmp_path.iterdir()] == ["merges.txt"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'{{"sha256": "{"a" * 64}"}}', {"base-sha256": "a" * 64}),
        ('{"sha256": "../x"}', {}),
        ("no json", {}),
        (None, {}),
    ],
)
def test_sites_compare_the_base_of_an_adapter(tmp_path, text, expected):
    """What the site that began the adapter said of its base goes with every order, if it is one."""
    publish_files(tmp_path, {} if text is None else {"base.json": text})
    assert base_options(tmp_path) == expected


def test_a_frozen_a_is_in_the_model_but_in_no_version(tmp_path):
    """Protects FFA-LoRA: B alone is exchanged, and what peft loads at the end is whole."""
    a, b = np.ones((2, 3), np.float32), np.zeros((4, 2), np.float32)
    initial = ArrayRecord({"q.lora_A.weight": Array(a), "q.lora_B.weight": Array(b)})
    factors, folder = tmp_path / "lora_A.safetensors", tmp_path / "model"
    trained = set_factors_apart(factors, initial)
    assert list(trained) == ["q.lora_B.weight"]
    publish_files(folder, {"adapter_config.json": "{}"})
    write_model(folder, ArrayRecord({"q.lora_B.weight": Array(b + 5)}), factors)
    written = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == set(initial)
    assert np.array_equal(written["q.lora_A.weight"], a)
    assert np.array_equal(written["q.lora_B.weight"], b + 5)


def test_a_run_begins_with_b_alone(tmp_path):
    """Protects the server's side of FFA-LoRA: A goes to a file of the run, B becomes version 0."""
    run = RunDir(tmp_path)
    initial = ArrayRecord({f"q.lora_{x}.weight": Array(np.ones((2, 2))) for x in "AB"})
    engine = SimpleNamespace(restored=None, initialize=lambda: (initial, {}))
    assert list(server_app._initial(run, engine, None, freeze_a=True)) == ["q.lora_B.weight"]
    assert list(load_file(run.frozen_factors)) == ["q.lora_A.weight"]
    assert list(server_app._initial(run, engine, None, freeze_a=False)) == list(initial)
