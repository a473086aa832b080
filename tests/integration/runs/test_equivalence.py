"""One facility under a synchronous strategy trains as if it were never interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from worlds.runs.run import ONE_SITE, Run

pytestmark = pytest.mark.slow

ALONE = [*ONE_SITE, "train.schedule_steps=90"]
PLAIN_DILOCO = ["strategy.outer_lr=1.0", "strategy.momentum=0.0"]


def _train(folder: Path, *overrides: str) -> dict[str, NDArray[np.float32]]:
    run = Run(folder, *overrides, settings=ALONE)
    assert run.end() == 0, run.said()
    assert run.summary()["facilities"]["local_a"]["steps"] == 90
    tensors: dict[str, NDArray[np.float32]] = load_file(folder / "model" / "model.safetensors")
    return tensors


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[np.float32]]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return _train(folder, *PLAIN_DILOCO, "rounds=1", "train.steps=90")


@pytest.mark.parametrize("strategy", [PLAIN_DILOCO, ["strategy=fedavg"]], ids=["diloco", "fedavg"])
def test_rounds_change_nothing(
    tmp_path: Path, uninterrupted: dict[str, NDArray[np.float32]], strategy: list[str]
) -> None:
    """Protects the whole path of weights and optimizer state: 2 x 45 steps = 90 steps."""
    found = _train(tmp_path / "run", *strategy, "rounds=2", "train.steps=45")
    for name, tensor in uninterrupted.items():
        error = np.linalg.norm(found[name] - tensor) / np.linalg.norm(tensor)
        assert error < 1e-5, f"{name}: {error}"
