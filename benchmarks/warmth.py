"""What a warm allocation saves: orders to one kept allocation against one allocation per order.

Compares, in one run on this machine, with the demo's model and data and alternating so that
load on the machine hits both alike:

- order handed in -> first optimizer step
- order handed in -> result, less the time spent training

    python benchmarks/warmth.py [orders]

Writes ``benchmarks/results/warmth.json``.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _machine import record

from flwr_hpc.config.compose import compose_config
from flwr_hpc.protocol import Order, OrderKind, Result
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.sites import site_settings
from flwr_hpc.site.launcher import Launcher, make_launcher

STEPS = 20


def launcher(folder: Path) -> Launcher:
    """Return a site of the demo in a folder of its own."""
    config = compose_config([f"run_dir={folder}", "+facility=local_a", f"train.steps={STEPS}"])
    run = RunDir.create(config)
    return make_launcher(site_settings(run, config, "local_a", run.key))


def order(site: Launcher, seq: int, kind: OrderKind, weights: Path | None) -> tuple[Result, float]:
    """Submit an order; return its result and the seconds until it was there."""
    began = time.monotonic()
    job = Order("bench", site.settings.name, seq, kind, steps=STEPS)
    site.site.submit(job, weights)
    status = site.site.wait(lambda: site.site.collect(job.id), None, {"done", "failed"})
    assert status.result is not None, status.error
    assert status.state == "done", status.error
    return status.result, time.monotonic() - began


def overheads(result: Result, wall: float) -> dict[str, float]:
    """Return the seconds that were not training."""
    rest = wall - result.seconds["train"]
    return {"outside training": rest, "to first step": rest - result.seconds.get("write", 0.0)}


def main(orders: int) -> None:
    """Run, print and record."""
    with tempfile.TemporaryDirectory() as folder:
        warm = launcher(Path(folder) / "warm")
        cold = launcher(Path(folder) / "cold")
        found: dict[str, list[dict[str, float]]] = {"warm": [], "cold": []}
        try:
            first, _ = order(warm, 0, "initialize", None)
            weights = Path(folder) / "start.safetensors"
            shutil.copy(warm.site.spool.order(first.order_id).weights, weights)
            order(warm, 1, "train", weights)
            for seq in range(2, 2 + orders):
                found["warm"].append(overheads(*order(warm, seq, "train", weights)))
                found["cold"].append(overheads(*order(cold, seq, "train", weights)))
                cold.site.cancel_all()
        finally:
            warm.site.cancel_all()
            cold.site.cancel_all()
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    ratios = {key: medians["cold"][key] / medians["warm"][key] for key in medians["warm"]}
    for key, ratio in ratios.items():
        values = f"cold {medians['cold'][key]:.2f} s, warm {medians['warm'][key]:.2f} s"
        print(f"{key:>18}: {values}, ratio {ratio:.1f}")
    config = dataclasses.asdict(compose_config(["+facility=local_a"]))
    record(
        "warmth",
        {"orders": orders, "steps": STEPS, "median_s": medians, "cold_over_warm": ratios},
        {key: config[key] for key in ("model", "data", "train")},
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
