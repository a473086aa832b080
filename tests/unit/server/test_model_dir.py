"""The small files that a site sends for the model's folder."""

from __future__ import annotations

import pytest

from flwr_hpc.server import model_dir
from flwr_hpc.server.model_dir import base_options, publish_files


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
