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


def assert_same(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-5) -> None:
    """Compare tensor by tensor, relative to its norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = np.linalg.norm(found[name].astype(np.float64) - value)
        assert difference <= rtol * np.linalg.norm(value), (name, difference)


def gpt2(**changed: Any) -> dict[str, Any]:
    """Return the shipped model that shares no name with Llama."""
    return dict(compose_config(["model=tiny_gpt2"]).model.config) | changed
