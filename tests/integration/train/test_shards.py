"""Each rank writes its own part of the weights, and reads its own, whoever wrote them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds.train.shard_scenarios as scenario
from safetensors.numpy import save_file
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


@pytest.mark.parametrize("codec", [["bf16"], ["topk", "int2"]], ids=str)
def test_updates_are_encoded_by_any_number_of_ranks(
    teams: dict[int, Team], tmp_path: Path, codec: list[str]
) -> None:
    """Protects updates and error feedback from a change of the world size and of the mesh: 2, 1 and
    4 ranks go on with each other's error, and nothing is lost but the last one."""
    start, shapes = tmp_path / f"{'0' * 64}.safetensors", teams[1].run(scenario.shapes)
    base = drawn(shapes, 0)
    save_file(base, start)
    trained, sent = dict.fromkeys(base, 0.0), dict.fromkeys(base, 0.0)
    for number, (ranks, mesh) in enumerate([(2, {}), (1, {}), (4, {"tensor": 2})]):
        by = drawn(shapes, 1 + number, scale=0.01)
        save_file({n: base[n] + by[n] for n in base}, tmp_path / f"o{number}.safetensors")
        found = teams[ranks].run(
            scenario.encoded, tmp_path, f"o{number}", start, codec, shards_above_mb=0.0, **mesh
        )
        assert len(found["payloads"]) == ranks
        assert found["names"] == sorted([*found["payloads"], "weights.json"])
        trained = {n: trained[n] + by[n] for n in base}
        sent = {n: sent[n] + (found["sent"][n] - base[n]) for n in base}
    together = {n: sent[n] + found["error"][n] for n in base}
    assert_same(together, trained, rtol=1e-4)


def test_a_gathered_update_is_that_of_one_rank(teams: dict[int, Team], tmp_path: Path) -> None:
    """Protects small weights, which rank 0 encodes alone: the bytes are those of one rank."""
    start = tmp_path / f"{'0' * 64}.safetensors"
    shapes, found = teams[1].run(scenario.shapes), {}
    save_file(drawn(shapes, 0), start)
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        save_file(drawn(shapes, 1), folder / "o.safetensors")
        sent = teams[ranks].run(scenario.encoded, folder, "o", start, ["topk", "int2"])
        found[ranks] = [(folder / "o" / name).read_bytes() for name in sent["payloads"]]
    assert len(found[2]) == 1
    assert found[1] == found[2]


def drawn(shapes: dict[str, Any], seed: int, scale: float = 1.0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {n: np.float32(scale) * draw.standard_normal(i, np.float32) for n, i in shapes.items()}


def test_a_torn_shard_is_refused_by_all(teams: dict[int, Team], tmp_path: Path) -> None:
    """Protects the ranks from weights of which some is missing, and from waiting for each other."""
    words = teams[2].run(scenario.spoiled, tmp_path)
    assert words[0] == words[1]
    assert words[0].startswith("UserError: weights")
    assert "weights-00001-of-00002.safetensors" in words[0]
