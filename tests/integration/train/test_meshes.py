"""Every mesh, and every way to save memory, computes what one process computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds.train.numerics_scenarios as scenario
from worlds.train.torch_ranks import Team, start_team


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Team]]:
    """One, two and four processes of a thread each; started once."""
    sizes = (1, 2, 4)
    teams = {size: start_team(tmp_path_factory.mktemp(f"team{size}"), size) for size in sizes}
    yield teams
    for team in teams.values():
        team.close()


def assert_same(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-5) -> None:
    """Compare tensor by tensor, relative to its norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = np.linalg.norm(found[name].astype(np.float64) - value)
        assert difference <= rtol * np.linalg.norm(value), (name, difference)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_replicas_of_shards_equal_one_process(
    teams: dict[int, Team], tmp_path: Path, tied: bool, lora: bool
) -> None:
    """HSDP 2 x 2: loss, gradient norm (with clipping), held-out loss, weights after four steps."""
    kind: dict[str, Any] = {"tied": tied, "lora": lora, "clip": 0.1}
    one = teams[1].run(scenario.trained, tmp_path / "1", micro_batch=8, **kind)
    four = teams[4].run(scenario.trained, tmp_path / "4", micro_batch=2, replicate=2, **kind)
    for key in ("losses", "train_loss", "grad_norm", "held_out"):
        np.testing.assert_allclose(four[key], one[key], rtol=1e-5, err_msg=key)
    assert one["grad_norm"] > kind["clip"], "not clipped"
    assert_same(four["weights"], one["weights"])


@pytest.mark.parametrize("every", [True, False])
def test_accumulation_over_replicas_equals_a_large_batch(
    teams: dict[int, Team], tmp_path: Path, every: bool
) -> None:
    """Gradients are summed over the replicas once a step, and none of a micro batch is lost."""
    parts: dict[str, Any] = {"micro_batch": 1, "accumulation": 2, "sync_every_micro_batch": every}
    one = teams[1].run(scenario.gradients, micro_batch=8)
    four = teams[4].run(scenario.gradients, replicate=2, **parts)
    assert_same(four, one)


def test_a_checkpoint_goes_from_four_ranks_to_two_to_one(
    teams: dict[int, Team], tmp_path: Path
) -> None:
    """The next allocations may have other shapes: replicas, shards alone, a single rank."""
    teams[4].run(scenario.save_then_go_on, tmp_path, micro_batch=2, replicate=2)
    two = teams[2].run(scenario.restore_save_then_go_on, tmp_path, micro_batch=4)
    one = teams[1].run(scenario.restore_then_go_on, tmp_path, micro_batch=8)
    expected = teams[1].run(scenario.straight_on, tmp_path / "straight", micro_batch=8)
    assert_same(two, expected)
    assert_same(one, expected)


def test_replicas_that_the_ranks_cannot_share_are_refused(teams: dict[int, Team]) -> None:
    """The error names what is valid, before anything is trained."""
    words = teams[2].run(scenario.trainer_error, replicate=3)
    assert words == "UserError: train.replicate=3 replicas cannot share 2 ranks. Valid: 1, 2"


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
