"""What of tensor parallelism can be judged without ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from flwr_hpc.config.schema import DataConfig, TrainConfig
from flwr_hpc.config.validate import UNSPLIT
from flwr_hpc.errors import UserError
from flwr_hpc.plan.families import FAMILIES
from flwr_hpc.train.metrics import Meter
from flwr_hpc.train.parallel.tensor_parallel import layer_plan
from flwr_hpc.train.progress import OrderProgress
from flwr_hpc.worker.phase_timer import PhaseTimer


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_know_which_families_can_be_split(family: str) -> None:
    """Protects from plans that the job refuses, and from families that are left out for nothing."""
    config = CONFIG_MAPPING[family]()
    if family in UNSPLIT:
        with pytest.raises(UserError, match=rf"model_type={family}.*Valid: train.tensor=1"):
            layer_plan(config)
    else:
        assert "rowwise" in layer_plan(config).values()


def test_tokens_are_counted_once_per_group() -> None:
    """Protects tokens/s and MFU: ranks that split a layer work on the same tokens."""
    group: Any = SimpleNamespace(ranks=SimpleNamespace(rank=0, world_size=4))
    train = TrainConfig(micro_batch=3, accumulation=2, tensor=2)
    reporter: Any = None
    meter = Meter(PhaseTimer(), reporter, group, train, DataConfig(seq_len=10), 1e12, 1.0)
    found = meter.metrics(OrderProgress(steps=5, tokens=1, seconds=2.0))
    assert found["tokens_per_s"] == 5 * 3 * 2 * 2 * 10 / 2.0
    assert found["mfu"] == pytest.approx(100 * found["tokens_per_s"] / 4)
