"""Warm allocations against one job per round, on contended Slurm clusters.

Two real clusters (`tests/lab`, as root) get the same seeded load of other users' jobs; on each,
the same federation of one facility runs ten rounds at the same time, once with
``allocation=warm`` and once with ``allocation=per_round``. Compared are wall time and node-hours.

    python benchmarks/clusters/policies.py [rounds]

Writes ``benchmarks/results/policies.json``. Hours of a centre are seconds here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _machine import record
from lab.cluster import Cluster
from lab.plan import Shape
from lab.traffic import Traffic, schedule

ROOT = Path(__file__).parents[2]
SEED, NODES, LOAD, MEAN_RUN_S = 1, 2, 0.9, 20.0
POLICIES = ("warm", "per_round")
SETTINGS = [
    "+facility=slurm",
    "facilities.slurm.account=null",
    "facilities.slurm.ranks_per_node=2",
    "facilities.slurm.gpus_per_node=0",
    "facilities.slurm.cpus_per_rank=1",
    "facilities.slurm.poll_s=2",
    "facilities.slurm.walltime=00:30:00",
    "train.steps=60",
    "train.warmup_steps=10",
    "data.seq_len=64",
]


def start(cluster: Cluster, policy: str, folder: Path, rounds: int) -> subprocess.Popen[bytes]:
    """Start the command."""
    settings = [
        *SETTINGS,
        f"facilities.slurm.env.SLURM_CONF={cluster.conf}",
        f"allocation={policy}",
        f"rounds={rounds}",
        f"run_dir={folder}",
    ]
    with open(folder.with_suffix(".log"), "wb") as log:
        command = [sys.executable, "-m", "flwr_hpc.run", *settings]
        env = os.environ | {"FLWR_HPC_STATE": str(folder.parent / f"state-{policy}")}
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def figures(folder: Path) -> dict[str, Any]:
    """Return what is compared of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished", folder.with_suffix(".log").read_text()[-3000:]
    site = summary["facilities"]["slurm"]
    return {
        "wall_s": summary["wall_s"],
        "node_s": {k: 3600.0 * v for k, v in site["node_hours"].items()},
        "seconds": site["seconds"],
        "held_out_loss": site["held_out_loss_last"],
        "orders": site["orders"],
    }


def main(rounds: int) -> None:
    """Run both at once, print and record."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="policies-")))
        running = {}
        for policy in POLICIES:
            name = f"bench_{policy.replace('_', '')}"
            shape = Shape(nodes=NODES, cpus=2)
            cluster = stack.enter_context(Cluster.up(name, shape))
            stack.enter_context(Traffic(cluster, schedule(SEED, 3600.0, NODES, LOAD, MEAN_RUN_S)))
            process = start(cluster, policy, folder / policy, rounds)
            stack.callback(process.terminate)
            running[policy] = process
        for process in running.values():
            process.wait(3000)
        found = {policy: figures(folder / policy) for policy in POLICIES}
    ratio = {
        "wall": found["per_round"]["wall_s"] / found["warm"]["wall_s"],
        "node_hours": found["per_round"]["node_s"]["used"] / found["warm"]["node_s"]["used"],
    }
    for policy, row in found.items():
        print(f"{policy}: {row['wall_s']:.0f} s, {row['node_s']['used']:.0f} node seconds")
    print("per_round / warm: " + ", ".join(f"{k} {v:.2f}" for k, v in ratio.items()))
    load = {"seed": SEED, "nodes": NODES, "load": LOAD, "mean_run_s": MEAN_RUN_S}
    record("policies", {**found, "ratio": ratio}, {"rounds": rounds, **load, "settings": SETTINGS})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
