"""QLoRA on real ranks: adapters over a base in 4 bit (bitsandbytes, here its CPU kernels)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from worlds.train import quantized_scenarios as scenario
from worlds.train.torch_ranks import Team, start_teams, tiny_model


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Team]]:
    yield from start_teams(tmp_path_factory.mktemp, (1, 2))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(seed=3).model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_it_trains_on_the_weights_that_4_bits_stand_for(
    teams: dict[int, Team], base: Path, tmp_path: Path
) -> None:
    """Protects the arithmetic: the same losses and adapter as over the dequantized checkpoint."""
    flops = teams[1].run(scenario.unpacked, base, tmp_path / "plain")
    packed = teams[1].run(scenario.trained, tmp_path / "4", base, "nf4", micro_batch=8)
    whole = teams[1].run(
        scenario.trained, tmp_path / "32", tmp_path / "plain", "none", micro_batch=8
    )
    np.testing.assert_allclose(packed["losses"], whole["losses"], rtol=1e-5)
    assert packed["weights"].keys() == whole["weights"].keys()
    for name, value in whole["weights"].items():
        np.testing.assert_allclose(packed["weights"][name], value, rtol=1e-3, atol=1e-6)
    assert packed["losses"][-1] < packed["losses"][0]
    assert (packed["kept"], whole["packed"]) == (True, 0)
    assert packed["bytes"] == packed["packed"] / 2
    assert flops == tiny_model(lora=True).flops_per_token, "counted as if not packed"


def test_two_ranks_equal_one(teams: dict[int, Team], base: Path, tmp_path: Path) -> None:
    """Protects sharding: adapters are cut, and every rank has the packed weights whole."""
    one = teams[1].run(scenario.trained, tmp_path / "1", base, "nf4", micro_batch=8)
    two = teams[2].run(scenario.trained, tmp_path / "2", base, "nf4", micro_batch=4)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(two["grad_norm"], one["grad_norm"], rtol=1e-5)
    assert two["packed"] == one["packed"] > 0
    assert all(".lora_" in name for name in two["weights"])
    for name, value in one["weights"].items():
        np.testing.assert_allclose(two["weights"][name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_activations_computed_again(
    teams: dict[int, Team], base: Path, tmp_path: Path, checkpointing: str
) -> None:
    """Protects activation checkpointing over packed weights."""
    plain = teams[1].run(scenario.trained, tmp_path / "1", base, "nf4", micro_batch=8)
    again = teams[1].run(
        scenario.trained, tmp_path / "2", base, "nf4", micro_batch=8,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    np.testing.assert_allclose(again["losses"], plain["losses"], rtol=1e-5)


def test_dora_over_4_bits(teams: dict[int, Team], base: Path, tmp_path: Path) -> None:
    """Protects DoRA, whose norms are taken of the weights that 4 bits stand for."""
    one = teams[1].run(scenario.trained, tmp_path / "1", base, "nf4", micro_batch=8, dora=True)
    two = teams[2].run(scenario.trained, tmp_path / "2", base, "nf4", micro_batch=4, dora=True)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][-1] < one["losses"][0]
