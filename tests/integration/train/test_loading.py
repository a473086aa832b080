"""A checkpoint is read shard by shard, and trained as if it had been read whole in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worlds.train.loading_scenarios as scenario
from flwr.app import Array, ArrayRecord
from transformers import AutoModelForCausalLM
from worlds.train.comparing import assert_same
from worlds.train.torch_ranks import LLAMA, Team, start_teams, tiny_model

from flwr_hpc.config.schema import ModelConfig
from flwr_hpc.server.model_dir import publish_files, write_model
from flwr_hpc.train.model import build

WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Team]]:
    yield from start_teams(tmp_path_factory.mktemp, (1, 2))


def _checkpoint(folder: Path, dtype: torch.dtype, **sizes: Any) -> Path:
    """Write a model whose numbers bfloat16 can hold, in one precision or another."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**LLAMA, **sizes}, vocab_size=67)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.to(dtype).save_pretrained(folder)
    return folder


def test_no_rank_holds_the_whole_model(teams: dict[int, Team], tmp_path: Path) -> None:
    """Protects hosts from models larger than their memory: till it is sharded, a checkpoint stays
    in its file, which all ranks of a host share; then each has its shards, here half."""
    path = _checkpoint(tmp_path / "wide", torch.bfloat16, **WIDE)
    small = _checkpoint(tmp_path / "small", torch.bfloat16)
    grown = teams[2].run(scenario.growth, path, small)
    assert grown["built"] < 0.2, grown
    assert 0.4 < grown["sharded"] < 0.95, grown


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_bfloat16_checkpoint_is_trained_in_float32(
    teams: dict[int, Team], tmp_path: Path, tied: bool
) -> None:
    """Protects the numbers: the same as of a float32 file with the same values, to the bit."""
    paths = {
        dtype: _checkpoint(tmp_path / str(dtype), dtype, tie_word_embeddings=tied)
        for dtype in (torch.bfloat16, torch.float32)
    }
    found, expected = (
        teams[2].run(scenario.trained, tmp_path, paths[dtype], tied=tied)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert found["losses"] == expected["losses"]
    assert_same(found["weights"], expected["weights"], rtol=0)


def test_a_model_in_several_files_is_loaded_back(teams: dict[int, Team], tmp_path: Path) -> None:
    """Protects who goes on from a large model that a run saved: by its folder, to the bit."""
    built, folder = tiny_model(), tmp_path / "model"
    expected = {name: p.detach().numpy() for name, p in built.model.named_parameters()}
    record = ArrayRecord({name: Array(value) for name, value in expected.items()})
    publish_files(folder, built.files)
    write_model(folder, record, shard_bytes=10_000)
    files = sorted(file.name for file in folder.glob("*.safetensors*"))
    assert len(files) > 4
    assert files[-1] == "model.safetensors.index.json"
    for ranks in (1, 2):
        assert_same(teams[ranks].run(scenario.loaded, tmp_path, folder), expected, rtol=0)
    found = teams[2].run(scenario.trained, tmp_path, folder)
    write_model(folder, record)
    assert_same(found["weights"], teams[2].run(scenario.trained, tmp_path, folder)["weights"], 0)


def test_adapters_of_a_bfloat16_checkpoint(teams: dict[int, Team], tmp_path: Path) -> None:
    """Protects LoRA: two ranks train what one does."""
    path = _checkpoint(tmp_path, torch.bfloat16)
    one, two = (
        teams[ranks].run(scenario.trained, tmp_path, path, lora=True, micro_batch=8 // ranks)
        for ranks in (1, 2)
    )
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    assert_same(two["weights"], one["weights"])


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16}, "gpt_neox": {}, "mixtral": {"num_local_experts": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_as_in_float32(family: str, tmp_path: Path) -> None:
    """Protects what is computed when a model is made: buffers are not rounded to bfloat16."""
    from worlds.train.torch_ranks import SEQ_LEN, TinyTokenizer

    from flwr_hpc.train.parallel.tensors import in_float32

    sizes = {} if family == "gpt2" else {k: v for k, v in LLAMA.items() if k != "model_type"}
    path = _checkpoint(tmp_path, torch.bfloat16, **sizes, **FAMILIES[family], model_type=family)
    model: Any = build(ModelConfig(path=str(path)), TinyTokenizer(), 0, SEQ_LEN).model
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(2, 2 + SEQ_LEN)[None]
    found = in_float32(model.eval())(ids).logits
    torch.testing.assert_close(found, expected.eval()(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}], ids=["shards", "tensor"])
def test_a_rank_reads_its_shards_alone(
    teams: dict[int, Team], tmp_path: Path, mesh: dict[str, Any]
) -> None:
    """Protects the file system from ranks that each read all weights; no tensor is even here."""
    found = teams[2].run(scenario.bytes_read, tmp_path, **mesh)
    ((whole, _),) = teams[1].run(scenario.bytes_read, tmp_path)
    assert all(read == held for read, held in found)
    assert whole <= sum(read for read, _ in found) < 1.1 * whole  # some both hold
    assert max(read for read, _ in found) < 0.6 * whole


@pytest.mark.parametrize("row", [0, 66], ids=["of the first rank", "of the last"])
def test_what_one_rank_finds_all_ranks_refuse(
    teams: dict[int, Team], tmp_path: Path, row: int
) -> None:
    """Protects the ranks from waiting for one that refused its part, and from going on without."""
    words = teams[2].run(scenario.refusals, tmp_path, row, float("nan"))
    assert words[0] == words[1]
    assert "'model.embed_tokens.weight' has a value that is not finite" in words[0]
    assert teams[2].run(scenario.refusals, tmp_path, row, 0.5) == ["taken", "taken"]
