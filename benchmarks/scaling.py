"""A scaling study in small: batch size, learning rate, precision and world size of an mT5.

The axes of ORNL's study of mT5, at every combination, through the command itself: ``run -m`` at a
local facility, span corruption on the standard library's source code.

    python benchmarks/scaling.py [FOLDER [sweep.parallel=N]]

Goes on in FOLDER if a sweep lies there. Writes ``benchmarks/results/scaling.json`` and ``.png``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

from _machine import RESULTS, record

ROOT = Path(__file__).parents[1]
AXES = {
    "train.batch_size": ("8", "16"),
    "train.lr": ("0.001", "0.003"),
    "train.precision": ("fp32", "bf16"),
    "facilities.local_a.ranks_per_node": ("1", "2"),
}
SETTINGS = [
    *("model=tiny_mt5", "data.objective=span_corruption", "data.seq_len=128", "+facility=local_a"),
    *("data.paths.local_a=[json,logging,email]", "data.held_out_sequences=64", "train.steps=100"),
    *("train.micro_batch=16", "train.warmup_steps=10", "rounds=1", "federation.wait_s=10"),
    "train.checkpoint_every_orders=0",
]

Point = Mapping[str, Any]


def sweep(folder: Path, options: Sequence[str]) -> None:
    """Run the sweep, or what of it has not ended."""
    axes = [f"{key}={','.join(values)}" for key, values in AXES.items()]
    command = [sys.executable, "-m", "flwr_hpc.run", "-m", *SETTINGS, *axes, *options]
    command.append(f"sweep.dir={folder}")
    with tempfile.TemporaryDirectory() as state:
        env = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_HPC_STATE": state}
        subprocess.run(command, cwd=ROOT, env=env, check=False)


def effects(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Return what the second value of each axis does, all else being equal: a mean over pairs."""
    known = {tuple(p["settings"].values()): p for p in points if p["status"] == "finished"}
    keys = list(points[0]["settings"])
    found = {}
    for key, (low, high) in AXES.items():
        at = keys.index(key)
        pairs = [
            (one, known[other])
            for settings, one in known.items()
            if settings[at] == low
            and (other := (*settings[:at], high, *settings[at + 1 :])) in known
        ]
        if not pairs:  # the sweep was ended before
            continue
        found[f"{key} {low} -> {high}"] = {
            "pairs": len(pairs),
            "loss": mean(b["loss"] - a["loss"] for a, b in pairs),
            "loss_each": [round(b["loss"] - a["loss"], 4) for a, b in pairs],
            "train_time": exp(mean(log(b["train_s"] / a["train_s"]) for a, b in pairs)),
            "tokens_per_s": exp(mean(log(b["tokens_per_s"] / a["tokens_per_s"]) for a, b in pairs)),
            "peak_memory_gb": mean(b["peak_memory_gb"] - a["peak_memory_gb"] for a, b in pairs),
        }
    return found


def note(folder: Path, options: Sequence[str]) -> bool:
    """Record what the points came to; return whether all have finished."""
    points: list[Point] = json.loads((folder / "sweep.json").read_text())["points"]
    found = effects(points)
    for name, effect in found.items():
        print(
            f"{name}: loss {effect['loss']:+.4f}, training time x{effect['train_time']:.2f}, "
            f"tokens/s x{effect['tokens_per_s']:.2f}, memory {effect['peak_memory_gb']:+.2f} GB"
        )
    config = {"settings": SETTINGS, "axes": AXES, "options": options}
    load = {"load_average": os.getloadavg()}
    record("scaling", load | {"points": points, "effects": found}, config)
    shutil.copy(folder / "sweep.png", RESULTS / "scaling.png")
    return all(point["status"] == "finished" for point in points)


def main() -> int:
    """Run the study."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "sweep"
    options = sys.argv[2:]
    sweep(folder, options)
    return 0 if note(folder, options) else 1


if __name__ == "__main__":
    sys.exit(main())
