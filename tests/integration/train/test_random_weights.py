"""A large model is drawn a layer at a time, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds.train.loading_scenarios as scenario
from worlds.train.comparing import assert_same
from worlds.train.torch_ranks import LLAMA, Team, start_teams, tiny_model

WIDE = {**LLAMA, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Team]]:
    yield from start_teams(tmp_path_factory.mktemp, (1, 2))


def test_no_rank_holds_the_whole_model(teams: dict[int, Team]) -> None:
    """Protects hosts from models larger than their memory: a rank has its shards, here half, and a
    layer that is drawn, here an eighth."""
    grown = teams[2].run(scenario.drawn, WIDE)
    assert grown["built"] < 0.05, grown
    assert 0.4 < grown["most"] < 0.85, grown


@pytest.mark.parametrize("model", [None, T5], ids=["llama", "t5"])
def test_ranks_and_meshes_begin_alike(
    teams: dict[int, Team], tmp_path: Path, model: dict[str, Any] | None
) -> None:
    """Protects equality, and sites of other sizes from another start: to the bit."""
    with scenario.drawn_apart():
        built = tiny_model(model=model)
    tensors = built.model.state_dict()
    expected = {file: tensors[name].numpy() for name, file in built.names.items()}
    assert all(np.isfinite(value).all() for value in expected.values())
    for ranks, options in (
        (1, {}), (2, {}), (2, {"tensor": 2}), (2, {"replicate": 2}),
        (1, {"one_unit_below": 10**9}),
    ):  # fmt: skip
        found = teams[ranks].run(scenario.begun, tmp_path, model=model, **options)
        assert_same(found, expected, rtol=0)


def test_it_is_trained_as_a_checkpoint_of_the_same_weights(
    teams: dict[int, Team], tmp_path: Path
) -> None:
    """Protects buffers that no checkpoint holds, as rotary frequencies, on sharded models."""
    with scenario.drawn_apart():
        model: Any = tiny_model().model
    model.save_pretrained(tmp_path / "model")
    expected = teams[2].run(scenario.trained, tmp_path, tmp_path / "model")
    found = teams[2].run(scenario.trained_from_random, tmp_path)
    assert found["losses"] == expected["losses"]
    assert_same(found["weights"], expected["weights"], rtol=0)
