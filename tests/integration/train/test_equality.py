"""Every mesh computes what one process computes: models by meshes, and from mesh to mesh.

fp32, relative to 1e-5, weights tensor by tensor: loss, gradient norm, held-out loss and weights
after four steps, of which the gradients are clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds.train.checkpoint_scenarios as checkpoints
import worlds.train.numerics_scenarios as scenario
from worlds.train.comparing import T5, assert_alike, assert_same
from worlds.train.torch_ranks import LLAMA, Team, start_teams

pytestmark = pytest.mark.slow  # seven processes, which one worker of the tests starts there

# Of T5 and mT5 transformers ties the three tables, whatever their configuration says.
MODELS: dict[str, dict[str, Any]] = {
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "untied": {**LLAMA, "tie_word_embeddings": False},
    "seq2seq": T5,
}
# Ranks, and how they are laid out; what is left of them is shards.
MESHES: dict[str, tuple[int, dict[str, int]]] = {
    "fsdp2": (2, {}),
    "fsdp4": (4, {}),
    "hsdp2x2": (4, {"replicate": 2}),
    "tp2": (2, {"tensor": 2}),
    "tp2-fsdp2": (4, {"tensor": 2}),
    "tp2-hsdp2": (4, {"tensor": 2, "replicate": 2}),
}
WAYS = {
    "fsdp4-fsdp2-1": ("fsdp4", "fsdp2"),
    "hsdp2x2-tp2-1": ("hsdp2x2", "tp2"),
    "tp2-fsdp2-fsdp4-tp2-1": ("tp2-fsdp2", "fsdp4", "tp2"),
}
KINDS = [
    pytest.param((model, lora), id=f"{model}-{adapter}")
    for model in MODELS
    for lora, adapter in ((False, "full"), (True, "lora"))
]


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Team]]:
    """One, two and four processes of a thread each; started once."""
    yield from start_teams(tmp_path_factory.mktemp, (1, 2, 4))


@pytest.fixture(scope="module")
def alone(teams: dict[int, Team], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what one process computes; once for all meshes."""
    found: dict[Any, Any] = {}

    def run(function: Any, kind: tuple[str, bool]) -> Any:
        if (key := (function, kind)) not in found:
            folder = tmp_path_factory.mktemp("one")
            found[key] = teams[1].run(function, folder, micro_batch=8, **options(kind))
        return found[key]

    return run


def options(kind: tuple[str, bool]) -> dict[str, Any]:
    model, lora = kind
    # The gradients of adapters are smaller, and eps not below them: see `TRAIN`.
    scale = {"clip": 0.1, "eps": 1e-5} if lora else {"clip": 0.2}
    return {"model": MODELS[model], "lora": lora, **scale}


def on(mesh: str) -> tuple[int, dict[str, Any]]:
    """Return the ranks of a mesh and its options, for 8 sequences a step."""
    ranks, layout = MESHES[mesh]
    return ranks, {"micro_batch": 8 * layout.get("tensor", 1) // ranks, **layout}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_equals_one_process(
    teams: dict[int, Team], tmp_path: Path, alone: Any, kind: tuple[str, bool], mesh: str
) -> None:
    """Protects what is learnt from how a site's GPUs are laid out."""
    one = alone(scenario.trained, kind)
    assert one["grad_norm"] > options(kind)["clip"], "not clipped"
    ranks, layout = on(mesh)
    assert_alike(teams[ranks].run(scenario.trained, tmp_path, **layout, **options(kind)), one)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_from_mesh_to_mesh(
    teams: dict[int, Team], tmp_path: Path, alone: Any, kind: tuple[str, bool], way: str
) -> None:
    """Protects a run whose next allocations have other shapes: no tensor is torn or lost."""
    straight = alone(checkpoints.straight_on, kind)
    first, *others = WAYS[way]
    ranks, layout = on(first)
    teams[ranks].run(checkpoints.save_then_go_on, tmp_path, **layout, **options(kind))
    found = []
    for mesh in others:
        ranks, layout = on(mesh)
        then = checkpoints.restore_save_then_go_on
        found.append(teams[ranks].run(then, tmp_path, **layout, **options(kind)))
    last = {"micro_batch": 8, **options(kind)}
    found.append(teams[1].run(checkpoints.restore_then_go_on, tmp_path, **last))
    for end in found:
        np.testing.assert_allclose(end["losses"], straight["losses"], rtol=1e-5)
        np.testing.assert_allclose(end["grad_norm"], straight["grad_norm"], rtol=1e-5)
        assert_same(end["weights"], straight["weights"])
