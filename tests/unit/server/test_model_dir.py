"""The small files that a site sends for the model's folder."""

from __future__ import annotations

import json
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


def _llama():
    """Return a small model of transformers and its weights as a strategy hands them over."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, tie_word_embeddings=True,
    ))  # fmt: skip
    weights = {n: p.detach().numpy() for n, p in model.named_parameters()}
    return model, weights


def test_a_large_model_is_saved_in_files_with_an_index(tmp_path):
    """transformers loads it, every tensor once; files keep to the limit or hold one."""
    from transformers import AutoModelForCausalLM

    model, weights = _llama()
    model.config.save_pretrained(tmp_path)
    record = ArrayRecord({name: Array(value) for name, value in weights.items()})
    limit = 3000
    write_model(tmp_path, record, shard_bytes=limit)
    files = {f.name: load_file(f) for f in sorted(tmp_path.glob("*.safetensors"))}
    assert len(files) > 3
    assert [*files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert sorted(n for held in files.values() for n in held) == sorted(weights)
    sizes = [sum(v.nbytes for v in held.values()) for held in files.values()]
    assert all(
        size <= limit or len(held) == 1 for size, held in zip(sizes, files.values(), strict=True)
    )
    assert max(sizes) > limit, "the embedding alone is larger"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {n: file for file, held in files.items() for n in held}
    found = AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters()
    for name, value in found:
        assert np.array_equal(value.detach().numpy(), weights[name]), name


def test_only_one_tensor_is_loaded_at_a_time(tmp_path):
    """Protects a server whose memory is smaller than the model."""
    loaded = []

    class Counted(Array):
        def numpy(self):
            loaded.append(len(list(tmp_path.glob("model-*.safetensors"))))
            return super().numpy()

    record = ArrayRecord()
    for i in range(4):
        record[f"w{i}"] = Counted(np.full((10, 10), i, np.float32))
    write_model(tmp_path, record, shard_bytes=400)
    assert loaded == [0, 1, 2, 3]  # each is in its file before the next


@pytest.mark.parametrize("sizes", [(400, 10**9), (10**9, 400), (400, 800)])
def test_a_model_that_is_cut_otherwise_replaces_the_one_before(tmp_path, sizes):
    """A run that goes on with another limit leaves no file that would be read in its place."""
    for step, size in enumerate(sizes):
        record = ArrayRecord(
            {f"w{i}": Array(np.full((10, 10), step, np.float32)) for i in range(4)}
        )
        write_model(tmp_path, record, shard_bytes=size)
    names = {f.name for f in tmp_path.iterdir()}
    whole = sizes[-1] == 10**9
    count = 0 if whole else 1600 // sizes[-1]
    expected = {f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)}
    assert names == expected | {"model.safetensors" if whole else "model.safetensors.index.json"}
    for file in tmp_path.glob("*.safetensors"):
        assert all((value == 1).all() for value in load_file(file).values())
