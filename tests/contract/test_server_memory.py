"""What decoding and averaging take of the server's memory, measured in a process of its own."""

from __future__ import annotations

import pytest
from worlds.exchange.memory import Model

MEMORY_GB = 0.05
# The largest tensor alone is above the limit.
SHAPES = {"embed": (16_000, 1000), "head": (4_000, 1000), "norm": (1000,)}
WITH = {
    "full": ("Flower's FedAvg", "DiLoCo", "FedBuff", "FedBackfill"),
    "int4": ("DiLoCo", "median"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("weights"), SHAPES)


@pytest.mark.parametrize("codec", WITH)
def test_aggregation_stays_within_the_memory_it_is_given(model, codec):
    """Protects the server from models and numbers of sites that it has no memory for."""
    encoded = list(model.encode(codec))
    for strategy in WITH[codec]:
        found = model.peak(strategy, codec, encoded, MEMORY_GB)
        assert found["rejected"] == 0
        assert found["moved"] > 1.001
        assert 0 < found["mb"] < 1e3 * MEMORY_GB < 4 * SHAPES["embed"][0] / 1e3, strategy
