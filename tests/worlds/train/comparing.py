"""Models that are trained twice, and how what came of it is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flwr_hpc.config.compose import compose_config

KINDS = [
    pytest.param({"tied": tied, "lora": lora}, id=f"{'tied' if tied else 'untied'}-{name}")
    for tied in (True, False)
    for lora, name in ((False, "full"), (True, "lora"))
]
T5: dict[str, Any] = {
    "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0,
}  # fmt: skip


def assert_same(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-5) -> None:
    """Compare tensor by tensor, relative to its norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = np.linalg.norm(found[name].astype(np.float64) - value)
        assert difference <= rtol * np.linalg.norm(value), (name, difference)


def gpt2(**changed: Any) -> dict[str, Any]:
    """Return the shipped model that shares no name with Llama."""
    return dict(compose_config(["model=tiny_gpt2"]).model.config) | changed


def assert_alike(found: dict[str, Any], one: dict[str, Any]) -> None:
    """Compare what `numerics_scenarios.trained` tells of two runs."""
    for key in ("losses", "train_loss", "grad_norm", "held_out"):
        np.testing.assert_allclose(found[key], one[key], rtol=1e-5, err_msg=key)
    for key in ("tokens", "sequences", "held_out_counts"):
        assert found[key] == one[key], f"{key}: ranks of a group take the same data"
    assert_same(found["weights"], one["weights"])
