"""A user's own strategy, data and tracking, from a folder with an awkward name."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds.runs.run import ONE_SITE, Run

pytestmark = pytest.mark.slow

STRATEGY = """
from strategies import HpcStrategy
from strategies.parts import rules

class HalfWay(HpcStrategy):
    '''Move half of the way to the mean.'''

    def aggregate(self, server_round, trained, weights):
        for name, mean in rules.record_mean(trained, weights):
            yield name, 0.5 * self.arrays[name].numpy() + 0.5 * mean
"""


def test_own_strategy_data_and_tracking(tmp_path: Path) -> None:
    """Protects `strategy._target_` of a file in the current folder, Parquet, and W&B offline."""
    folder = tmp_path / 'Jürgen\'s "own" run'
    folder.mkdir()
    (folder / "half_way.py").write_text(STRATEGY)
    records = [{"prompt": f"{k} + 1 = ", "completion": str(k + 1)} for k in range(400)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "records.parquet")
    run = Run(
        folder / "run",
        "strategy=custom",
        "strategy._target_=half_way.HalfWay",
        "data=parquet",
        f"data.paths.local_a=[{tmp_path}/records.parquet]",
        "train.steps=40",
        "tracking=wandb",
        "tracking.mode=offline",
        settings=ONE_SITE,
    )
    assert run.end() == 0, run.said()
    summary = run.summary()
    assert summary["strategy"] == "half_way.HalfWay"
    for site in summary["facilities"].values():
        assert site["held_out_loss_last"] < site["held_out_loss_first"]
    assert list((run.dir / "wandb").glob("offline-run-*"))
    assert json.loads((run.dir / "model" / "config.json").read_text())["model_type"] == "llama"
