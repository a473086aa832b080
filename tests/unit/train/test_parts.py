"""The small pieces inside an allocation: schedule, loss, lifeline, weight files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds.train.torch_ranks import LLAMA, SEQ_LEN, VOCABULARY, TinyTokenizer, tiny_model

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.schema import LoraConfig, ModelConfig, TrainConfig
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.codecs.full import FullWeights
from flwr_hpc.exchange.compression.encoder import Encoder
from flwr_hpc.exchange.shards.manifest import MAX_SHARDS
from flwr_hpc.train.metrics import flops_per_token, mfu
from flwr_hpc.train.model import build, exchanged, layers
from flwr_hpc.train.optim import learning_rate, schedule_steps
from flwr_hpc.train.weights import WeightsWriter, layout_of, read_weights, write_weights
from flwr_hpc.worker.lifeline import GOODBYE, Lifeline

TRAIN = TrainConfig(steps=10, lr=1.0, min_lr_ratio=0.1, warmup_steps=4)


def test_schedule_spans_the_run() -> None:
    """Warm-up happens once, and the cosine ends with the run and not with a round."""
    total = schedule_steps(TRAIN, rounds=5)
    rates = [learning_rate(step, TRAIN, total) for step in range(total + 1)]
    assert total == 50
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[27] == pytest.approx(0.55)  # half way
    assert rates[50] == pytest.approx(0.1)
    assert learning_rate(10**6, TRAIN, total) == pytest.approx(0.1)
    assert schedule_steps(dataclasses.replace(TRAIN, schedule_steps=7), rounds=5) == 7


@pytest.mark.parametrize("orderly", [True, False])
def test_lifeline_tells_a_death_from_a_goodbye(orderly: bool) -> None:
    """A closed connection means a dead peer unless it said goodbye."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        theirs = socket.create_connection(door.getsockname())
        connection, _ = door.accept()
    lost = threading.Event()
    lifeline = Lifeline({1: connection}, on_lost=lambda rank: lost.set())
    if orderly:
        theirs.sendall(GOODBYE)
    theirs.close()
    lifeline._thread.join(600)
    connection.close()
    assert lost.is_set() is not orderly


def test_more_ranks_than_a_manifest_names_write_one_file(tmp_path: Path) -> None:
    """Protects an order from weights that no one could read."""
    group: Any = SimpleNamespace(ranks=SimpleNamespace(world_size=MAX_SHARDS + 1, rank=0))
    tensors = {"a": torch.ones(3, 5)}
    path = tmp_path / "weights.safetensors"
    staged = WeightsWriter(group, tensors, 0.0, Encoder(FullWeights())).stage(
        path, tensors.items(), layout_of(tensors.items())
    )
    staged.publish()
    assert staged.path == path
    assert load_file(path)["a"].sum() == 15


def test_weight_file_is_safetensors(tmp_path: Path) -> None:
    """Written tensor by tensor, read by the library; the hash is that of the file."""
    tensors = {"a": torch.randn(3, 5), "b.c": torch.randn(()), "empty": torch.zeros(0, 4)}
    path = tmp_path / "folder" / "weights.safetensors"
    sha256 = write_weights(path, layout_of(tensors.items()), tensors.values())
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())


def test_an_unreadable_weight_file_is_named(tmp_path: Path) -> None:
    """Missing or torn files are errors one can read."""
    torn = tmp_path / "torn.safetensors"
    save_file({"a": torch.zeros(64)}, torn)
    torn.write_bytes(torn.read_bytes()[:-8])
    for path in (torn, tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match=f"{path.name} cannot be read"):
            read_weights(path, {}, {})


def test_weights_of_any_float_are_read_as_they_travel(tmp_path: Path) -> None:
    """bfloat16, which numpy lacks, comes back exact; a part of the model may be asked for."""
    path, value = tmp_path / "w.safetensors", torch.randn(3, 5)
    save_file({"a": value.bfloat16(), "b": value}, path)
    read = {"a": torch.zeros(3, 5), "b": torch.zeros(3, 5)}
    layout = layout_of(read.items())
    read_weights(path, layout, read)
    assert torch.equal(read["a"], value.bfloat16().float())
    assert torch.equal(read["b"], value)
    half = {"a": torch.zeros(3, 5, dtype=torch.bfloat16)}
    read_weights(path, layout, half)
    assert torch.equal(half["a"], value.bfloat16())


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"a": (2, 3)}, r"1 tensors are missing \(b\)"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, r"1 tensors are unknown \(c\)"),
        ({"a": (2, 3), "b": (5,)}, r"'b' has shape \(5,\), expected \(4,\)"),
    ],
)
def test_differences_of_names_and_shapes_are_listed(
    tmp_path: Path, found: dict[str, tuple[int, ...]], says: str
) -> None:
    """The message names tensors and both shapes."""
    expected = layout_of([("a", torch.zeros(2, 3)), ("b", torch.zeros(4))])
    save_file({name: torch.zeros(shape) for name, shape in found.items()}, tmp_path / "w")
    with pytest.raises(UserError, match=says):
        read_weights(tmp_path / "w", expected, {})


@pytest.mark.parametrize("tied", [True, False])
def test_exchanged_names_are_those_of_hugging_face(tied: bool) -> None:
    """A tied head travels once."""
    built = tiny_model(tied=tied)
    assert ("lm_head.weight" in built.names.values()) is not tied
    assert "model.embed_tokens.weight" in built.names.values()
    assert set(exchanged(built.model)) == set(built.names)
    assert len(layers(built.model)) == 2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_names_are_those_of_peft(kind: str) -> None:
    """Only the adapter travels, under the names of ``adapter_model.safetensors``."""
    from peft import get_peft_model_state_dict

    built = tiny_model(**{kind: True})  # type: ignore[arg-type]
    expected = get_peft_model_state_dict(built.model, save_embedding_layers=False)
    assert set(built.names.values()) == set(expected)
    magnitudes = [n for n in built.names.values() if n.endswith("q_proj.lora_magnitude_vector")]
    assert len(magnitudes) == 2 * (kind == "dora")
    assert json.loads(built.files["adapter_config.json"])["use_dora"] is (kind == "dora")
    assert "config.json" not in built.files


def test_a_model_with_other_names_is_one_yaml(tmp_path: Path) -> None:
    """Protects from Llama's names: GPT-2's layers, sizes, Conv1D and tied head are found."""
    config = ModelConfig(config=dict(compose_config(["model=tiny_gpt2"]).model.config))
    built = build(config, TinyTokenizer(), 0, SEQ_LEN)
    assert [type(layer).__name__ for layer in layers(built.model)] == 4 * ["GPT2Block"]
    built.model._no_split_modules = None  # type: ignore[assignment]
    assert len(layers(built.model)) == 4  # where transformers says nothing
    looked_up = 1024 * 64  # the positions; the words' embedding is the head
    multiplied = sum(p.numel() for p in built.model.parameters()) - looked_up
    assert built.flops_per_token == 6 * multiplied + 12 * 4 * 64 * SEQ_LEN
    built.model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(built.names.values())
    lora = ModelConfig(path=str(tmp_path), lora=LoraConfig(r=2))
    adapter = build(lora, TinyTokenizer(), 0, SEQ_LEN)
    assert any("attn.c_attn.lora_A" in name for name in adapter.names.values())
    assert len(layers(adapter.model)) == 4


def test_with_a_frozen_b_alone_is_trained_and_travels() -> None:
    """Protects FFA-LoRA: A is the same at every facility, another in every layer and run."""
    torch.manual_seed(5)  # what a job drew before does not matter
    one, again, other = (
        tiny_model(lora=True, freeze_a=True, seed=seed).model.state_dict() for seed in (0, 0, 1)
    )
    built = tiny_model(lora=True, freeze_a=True)
    assert built.names
    assert all(".lora_B." in name for name in built.names.values())
    assert {n.replace("lora_A", "lora_B") for n in built.frozen.values()} == set(
        built.names.values()
    )
    for name in built.frozen:
        bound = one[name].shape[1] ** -0.5
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])
        assert 0.5 * bound < float(one[name].abs().max()) <= bound
    assert len({tuple(one[name].flatten().tolist()) for name in built.frozen}) == len(built.frozen)
    assert all(not one[name].any() for name in built.names)  # B begins at zero
    assert not tiny_model(lora=True).frozen


def test_every_facility_builds_the_same_model() -> None:
    """Frozen base weights never travel, so they must come out the same everywhere."""
    one, two = (tiny_model(lora=True).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llamma"}, "Unrecognized model"),
        ({"model_type": "llama", "hiden_size": 3}, "Did you mean 'hidden_size'"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 9},
         "tokenizer"),
    ],
)  # fmt: skip
def test_wrong_model_configurations_are_explained(config: dict[str, object], message: str) -> None:
    """Also misspelt keys, which transformers would silently ignore."""
    with pytest.raises(UserError, match=message):
        build(ModelConfig(config=config), TinyTokenizer(), 0, SEQ_LEN)


def test_missing_checkpoint_is_explained(tmp_path: Path) -> None:
    """The message names the key and what it may be."""
    with pytest.raises(UserError, match=r"model\.path="):
        build(ModelConfig(path=str(tmp_path / "none")), TinyTokenizer(), 0, SEQ_LEN)


@pytest.mark.parametrize(
    ("kind", "experts"),
    [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")],
)
def test_flops_count_the_experts_that_a_token_goes_to(kind: str, experts: str) -> None:
    """A mixture's MFU is not four times too high: two of eight experts work on a token."""
    sizes = {**LLAMA, "model_type": kind, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    if kind != "mixtral":
        sizes |= {"moe_intermediate_size": 44}
    two, eight = (tiny_model(model=sizes | {experts: n}).flops_per_token for n in (2, 8))
    routers = 6 * 2 * (8 - 2) * 32  # a row per expert, in each of two layers
    assert eight - two == routers


def test_flops_follow_the_published_formula() -> None:
    """6 N per token and the attention's share; adapters spare the frozen weights' gradients."""
    built = tiny_model(tied=False)
    parameters = sum(p.numel() for p in built.model.parameters()) - VOCABULARY * 32
    expected = 6 * parameters + 6 * 2 * 2 * (16 + 16) * SEQ_LEN
    assert built.flops_per_token == expected
    assert tiny_model(tied=False, lora=True).flops_per_token < 0.9 * expected
    assert flops_per_token(object(), built.model, SEQ_LEN) == 0
    assert mfu(1000.0, 1e9, 2, 1.0) == pytest.approx(50.0)
    assert mfu(1000.0, 1e9, 2, None) is None
