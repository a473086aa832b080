"""Compiled layers compute what eager ones do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worlds.train.numerics_scenarios as scenario
from worlds.train.comparing import T5, assert_same
from worlds.train.torch_ranks import Team, start_teams


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Two processes that import torch by a path with a space, and have nothing compiled yet."""
    packages = tmp_path_factory.mktemp("a space") / "site packages"
    packages.symlink_to(Path(torch.__path__[0]).parent)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", str(packages), prepend=os.pathsep)
        m.syspath_prepend(str(packages))
        m.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        for teams in start_teams(tmp_path_factory.mktemp, (2,), fresh=True):
            yield teams[2]


def test_torch_lies_at_a_path_with_a_space(pair: Team) -> None:
    """Protects what the others show: that code is linked there, too."""
    assert " " in pair.run(scenario.path_of_torch)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"activation_checkpointing": "full"}, id="full"),
        pytest.param({"activation_checkpointing": "selective"}, marks=pytest.mark.slow, id="some"),
        pytest.param({"lora": True}, marks=pytest.mark.slow, id="lora"),
        pytest.param({"tensor": 2}, marks=pytest.mark.slow, id="tensor-ranks"),
        pytest.param({"model": {**T5, "num_layers": 1}}, marks=pytest.mark.slow, id="t5"),
    ],
)
def test_compiled_layers_equal_eager_ones(pair: Team, tmp_path: Path, kind: dict[str, Any]) -> None:
    """Loss, gradient norm, held-out loss and weights, with what else changes a layer."""
    options: dict[str, Any] = {"eps": 1e-5, **kind}
    eager = pair.run(scenario.trained, tmp_path / "1", **options)
    found = pair.run(scenario.trained, tmp_path / "2", compile=True, **options)
    for key in ("losses", "grad_norm", "held_out"):
        np.testing.assert_allclose(found[key], eager[key], rtol=1e-5, err_msg=key)
    assert_same(found["weights"], eager["weights"])


def test_compiled_layers_are_recomputed_all_the_same(pair: Team) -> None:
    """transformers checkpoints inside of `forward`, where compiling a layer may lose it."""
    plain, saving = (
        pair.run(scenario.kept_bytes, compile=compiled, activation_checkpointing=kind)
        for compiled, kind in ((False, "none"), (True, "full"))
    )
    assert saving < 0.6 * plain
