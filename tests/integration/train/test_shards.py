"""Each rank writes its own part of the weights, and reads its own, whoever wrote them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worlds.train.shard_scenarios as scenario
from worlds.train.comparing import assert_same
from worlds.train.torch_ranks import Team, start_teams

MESHES = {
    "shards": {},
    "replicas": {"replicate": 2},
    "tensor": {"tensor": 2},
    "tensor lora": {"tensor": 2, "lora": True},
    "tensor replicas": {"tensor": 2, "replicate": 2},
}
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Team]]:
    yield from start_teams(tmp_path_factory.mktemp, (1, 2, 4))


def assert_written(found: dict[str, Any], folder: Path, ranks: int) -> None:
    assert_same(found["found"], found["expected"], rtol=0)
    shards = [f"weights-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)]
    assert found["names"] == sorted([*shards, "weights.json"])
    manifest = (folder / "weights.json").read_bytes()
    assert found["sha256"] == hashlib.sha256(manifest).hexdigest()


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_ranks_write_their_own_rows(
    teams: dict[int, Team], tmp_path: Path, mesh: dict[str, Any]
) -> None:
    """Protects GPUs from waiting for a gather: every row is in one shard, of even sizes."""
    found = teams[4].run(scenario.written, tmp_path, **mesh)
    assert_written(found, tmp_path, 4)
    assert max(found["bytes"]) < 1.4 * sum(found["bytes"]) / 4, "replicas share the writing"


@pytest.mark.parametrize("model", [NEOX, T5], ids=["gpt_neox", "t5"])
def test_families_write_their_own_rows(
    teams: dict[int, Team], tmp_path: Path, model: dict[str, Any]
) -> None:
    """Biases that are whole on all ranks, and matrices that are cut along either dimension."""
    found = teams[2].run(scenario.written, tmp_path, model=model, tensor=2)
    assert_written(found, tmp_path, 2)


def test_shards_go_from_four_ranks_to_two_to_one(teams: dict[int, Team], tmp_path: Path) -> None:
    """Protects an order that another job takes over: other shards are read, and none are left."""
    first = teams[4].run(scenario.written, tmp_path, tensor=2)["found"]
    two = teams[2].run(scenario.taken_over, tmp_path, shards_above_mb=0.0)
    one = teams[1].run(scenario.taken_over, tmp_path, shards_above_mb=0.0)
    four = teams[4].run(scenario.taken_over, tmp_path, shards_above_mb=0.0)
    assert_same(two["loaded"], first, rtol=0)
    assert_same(one["loaded"], first, rtol=0)
    assert_same(four["loaded"], first, rtol=0)
    assert len(two["names"]) == 3
    assert one["names"] == ["weights.safetensors"]
    assert len(four["names"]) == 5


def test_a_torn_shard_is_refused_by_all(teams: dict[int, Team], tmp_path: Path) -> None:
    """Protects the ranks from weights of which some is missing, and from waiting for each other."""
    words = teams[2].run(scenario.spoiled, tmp_path)
    assert words[0] == words[1]
    assert words[0].startswith("UserError: weights")
    assert "weights-00001-of-00002.safetensors" in words[0]
