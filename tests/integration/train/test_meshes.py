"""What saves memory, algorithms and model families on several meshes change no number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worlds.train.checkpoint_scenarios as checkpoints
import worlds.train.numerics_scenarios as scenario
from worlds.train.comparing import T5, assert_alike, assert_same
from worlds.train.torch_ranks import Team, start_teams


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Team]]:
    """One, two and four processes of a thread each; started once."""
    yield from start_teams(tmp_path_factory.mktemp, (1, 2, 4))


@pytest.mark.parametrize("every", [True, False])
def test_accumulation_over_replicas_equals_a_large_batch(
    teams: dict[int, Team], tmp_path: Path, every: bool
) -> None:
    """Gradients are summed over the replicas once a step, and none of a micro batch is lost."""
    parts: dict[str, Any] = {"micro_batch": 1, "accumulation": 2, "sync_every_micro_batch": every}
    one = teams[1].run(scenario.gradients, micro_batch=8)
    four = teams[4].run(scenario.gradients, replicate=2, **parts)
    assert_same(four, one)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_offloading_changes_no_number(teams: dict[int, Team], tmp_path: Path, lora: bool) -> None:
    """FSDP and HSDP with accumulation: to the bit what the same ranks compute without."""
    kind: dict[str, Any] = {"lora": lora, "clip": 0.1, "accumulation": 2, "micro_batch": 1}
    for ranks, mesh in ((2, {}), (4, {"replicate": 2})):
        found, expected = (
            teams[ranks].run(scenario.trained, tmp_path / "w", cpu_offload=on, **mesh, **kind)
            for on in (True, False)
        )
        assert found["losses"] == expected["losses"]
        assert_same(found["weights"], expected["weights"], rtol=0)


def test_a_checkpoint_of_offloaded_state_goes_on_without(
    teams: dict[int, Team], tmp_path: Path
) -> None:
    """Protects runs whose next job has more memory, or less."""
    teams[2].run(checkpoints.save_then_go_on, tmp_path, micro_batch=4, cpu_offload=True)
    one = teams[1].run(checkpoints.restore_then_go_on, tmp_path, micro_batch=8)
    expected = teams[1].run(checkpoints.straight_on, tmp_path / "straight", micro_batch=8)
    assert_same(one["weights"], expected["weights"])


LAYERS = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
GROUPED = {**LAYERS, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = [
    {"model_type": "qwen2", **LAYERS, "num_key_value_heads": 2},
    {"model_type": "qwen3", **GROUPED},
    {"model_type": "gemma2", **GROUPED},
    {"model_type": "gpt_neox", **LAYERS},
    {**T5, "model_type": "mt5", "feed_forward_proj": "gated-gelu"},
]


@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: str(model["model_type"]))
def test_families_are_split_alike(
    teams: dict[int, Team], tmp_path: Path, model: dict[str, Any]
) -> None:
    """Grouped heads, biases, norms of each head, a soft cap, queries and keys in one matrix;
    an encoder with biases for relative positions."""
    lora = model["model_type"] in ("qwen2", "mt5")
    scale = {"clip": 0.1, "eps": 1e-5} if lora else {"clip": 0.2}
    kind: dict[str, Any] = {"model": model, "lora": lora, **scale}
    one = teams[1].run(scenario.trained, tmp_path / "1", micro_batch=8, **kind)
    four = teams[4].run(scenario.trained, tmp_path / "4", micro_batch=4, tensor=2, **kind)
    assert_alike(four, one)


def test_what_saves_memory_goes_with_tensor_ranks(teams: dict[int, Team], tmp_path: Path) -> None:
    """A loss in chunks, recomputed layers and gradients that are summed once per step."""
    saving: dict[str, Any] = {
        "micro_batch": 2, "accumulation": 2, "chunk_bytes": 4096,
        "activation_checkpointing": "selective", "sync_every_micro_batch": False,
    }  # fmt: skip
    one = teams[1].run(scenario.gradients, micro_batch=8)
    four = teams[4].run(scenario.gradients, tensor=2, **saving)
    assert_same(four, one)


@pytest.mark.parametrize("mesh", [{}, {"replicate": 2}], ids=["shards", "replicas"])
def test_fedprox_goes_with_tensor_ranks(
    teams: dict[int, Team], tmp_path: Path, mesh: dict[str, int]
) -> None:
    """The pull towards the start is taken shard by shard."""
    kind: dict[str, Any] = {"mu": 0.1, "clip": 0.2}
    one = teams[1].run(scenario.trained, tmp_path / "1", micro_batch=8, **kind)
    parts = {"micro_batch": 4, "tensor": 2, **mesh}
    assert_alike(teams[4].run(scenario.trained, tmp_path / "4", **parts, **kind), one)


def test_scaffold_goes_with_tensor_ranks(teams: dict[int, Team], tmp_path: Path) -> None:
    """Sums of gradients and corrections are those of whole tensors."""
    for folder in ("1", "2"):
        (tmp_path / folder).mkdir()
    one = teams[1].run(scenario.with_variates, tmp_path / "1", micro_batch=8)
    two = teams[2].run(scenario.with_variates, tmp_path / "2", micro_batch=8, tensor=2)
    assert_same(two["weights"], one["weights"])
    assert_same(two["mean"], one["mean"], rtol=1e-4)


def test_tensor_ranks_drop_the_same(teams: dict[int, Team]) -> None:
    """What all of them hold, as norms and biases, stays the same on all of them."""
    dropout = {"hidden_dropout": 0.5, "attention_dropout": 0.5}
    model = {"model_type": "gpt_neox", **LAYERS, **dropout}
    assert teams[2].run(scenario.replicas_differ, model=model, tensor=2) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor": 3}, "train.tensor=3: groups of 3 ranks cannot share the 2 ranks. Valid: 1, 2"),
        ({"dora": True}, "how to split q_proj.lora_magnitude_vector"),
        ({"model": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}}, "=gpt2"),
        ({"model": {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2}},
         "model_type=bloom has no plan in transformers"),
        ({"model": {"model_type": "phi3", **LAYERS, "pad_token_id": 0}}, "colwise_gather_output"),
        ({"model": {"model_type": "olmo2", **LAYERS}}, "olmo2"),
        ({"model": {"model_type": "llama", **LAYERS, "num_key_value_heads": 1}},
         "num_attention_heads=4, num_key_value_heads=1, intermediate_size=44. Valid: 1"),
    ],
    ids=["ranks", "dora", "gpt2", "no plan", "fused", "norms of all heads", "heads"],
)  # fmt: skip
def test_what_cannot_be_split_is_refused(
    teams: dict[int, Team], options: dict[str, Any], words: str
) -> None:
    """Protects from a model that trains, and is another one: refused with words, on all ranks."""
    error = teams[2].run(scenario.trainer_error, **{"tensor": 2, **options})
    assert error.startswith("UserError")
    assert words in error


def test_replicas_that_the_ranks_cannot_share_are_refused(teams: dict[int, Team]) -> None:
    """The error names what is valid, before anything is trained."""
    words = teams[2].run(scenario.trainer_error, replicate=3)
    assert words == "UserError: train.replicate=3 replicas cannot share the 2 ranks. Valid: 1, 2"


def test_selective_checkpointing_changes_nothing(teams: dict[int, Team], tmp_path: Path) -> None:
    """It computes activations again, not products, and brings the same numbers."""
    plain = teams[2].run(scenario.trained, tmp_path / "1")
    some = teams[2].run(scenario.trained, tmp_path / "2", activation_checkpointing="selective")
    assert_same(some["weights"], plain["weights"], rtol=1e-6)


def test_selective_checkpointing_computes_no_product_again(teams: dict[int, Team]) -> None:
    """The reason to choose it: less is kept than with none, at the FLOPs of none."""
    kinds = ("none", "selective", "full")
    none, selective, full = (teams[1].run(scenario.step_flops, kind) for kind in kinds)
    assert none[0] == selective[0] < full[0]
    assert selective[1] < none[1]
