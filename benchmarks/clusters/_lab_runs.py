"""Federations on real Slurm clusters that other users' jobs contend for.

They run through the whole command: SuperLink, SuperNodes, sbatch, jobs. The jobs train the
simulator's network, at a step time of each cluster's own (`_paced_worker`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from lab.cluster import Cluster
from lab.host import missing
from lab.plan import Shape
from lab.traffic import Traffic, schedule

__all__ = ["CASES", "MEAN_RUN_S", "NODES", "PLACES", "SEED", "STEPS", "Case", "Place", "make"]

ROOT = Path(__file__).parents[2]
SEED = 0
NODES, MEAN_RUN_S, WARM_UP_S = 2, 12.0, 15.0  # of a cluster; of other users' jobs
HOOK = 'from flwr_hpc.worker import entry\nentry.WORKER = "_paced_worker"\n'


@dataclass(frozen=True)
class Place:
    """A cluster: seconds per step, walltime of a job, other users' load."""

    step_s: float
    walltime: str
    load: float


@dataclass(frozen=True)
class Case:
    """A federation: settings of the command, versions to make, target loss."""

    strategy: str
    policy: str
    versions: int
    target: float
    settings: tuple[str, ...] = ()


STEPS = 60  # of an order, where the strategy does not decide
PLACES = {
    "faith_a": Place(0.05, "00:01:00", 0.65),
    "faith_b": Place(0.1, "00:02:00", 0.8),
    "faith_c": Place(0.2, "00:02:00", 0.7),
}
CASES = {
    "fedbackfill_warm": Case("fedbackfill", "warm", 25, 2.1, ("strategy.round_s=8",)),
    "diloco_warm": Case("diloco", "warm", 6, 2.1),
    "diloco_per_round": Case("diloco", "per_round", 5, 2.2),
}


def facility(cluster: Cluster, place: Place, hook: Path) -> dict[str, Any]:
    """Return a facility file."""
    path = os.pathsep.join([str(hook), str(Path(__file__).parent)])
    return {
        "scheduler": "slurm", "account": None, "partition": "main", "nodes": 1,
        "ranks_per_node": 1, "gpus_per_node": 0, "cpus_per_rank": 1, "walltime": place.walltime,
        "poll_s": 1, "options": {"exclusive": ""},
        "env": {
            "SLURM_CONF": str(cluster.conf), "PYTHONPATH": path, "PACED_STEP_S": str(place.step_s),
        },
    }  # fmt: skip


def write_conf(folder: Path, clusters: Mapping[str, Cluster]) -> Path:
    """Write the facilities, and what puts the benchmark's worker into their jobs."""
    hook = folder / "hook"
    hook.mkdir(parents=True, exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    (folder / "conf" / "facility").mkdir(parents=True, exist_ok=True)
    for name, cluster in clusters.items():
        text = yaml.safe_dump(facility(cluster, PLACES[name], hook))
        target = folder / "conf" / "facility" / f"{name}.yaml"
        target.write_text(f"# @package facilities.{name}\n{text}")
    return folder / "conf"


def run(case: Case, conf: Path, folder: Path) -> None:
    """Run a federation to its end."""
    settings = [
        f"--config-dir={conf}",
        f"+facility=[{','.join(PLACES)}]",
        f"strategy={case.strategy}",
        f"allocation={case.policy}",
        f"rounds={case.versions}",
        f"train.steps={STEPS}",
        f"seed={SEED}",
        f"run_dir={folder}",
        *case.settings,
    ]
    env = os.environ | {"FLWR_HPC_STATE": f"{folder}-state", "OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".log"), "wb") as log:
        command = [sys.executable, "-m", "flwr_hpc.run", *settings]
        subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, timeout=1200)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished", folder.with_suffix(".log").read_text()[-3000:]


def contended(clusters: Mapping[str, Cluster], seed: int, stack: ExitStack) -> None:
    """Empty the clusters, then let other users come."""
    for index, (name, cluster) in enumerate(clusters.items()):
        cluster.reset()
        jobs = schedule(100 * seed + index, 1200.0, NODES, PLACES[name].load, MEAN_RUN_S)
        stack.enter_context(Traffic(cluster, jobs))
    time.sleep(WARM_UP_S)


def make(folders: Mapping[str, Sequence[Path]], folder: Path) -> bool:
    """Make the runs that are not there yet; False if this machine cannot."""
    todo = [
        (repetition, CASES[name], own[repetition])
        for repetition in range(max(map(len, folders.values())))
        for name, own in folders.items()
        if not (own[repetition] / "summary.json").exists()
    ]
    if todo and (reason := missing()):
        print(f"skipped: {reason}")
        return False
    with ExitStack() as stack:
        shape = Shape(nodes=NODES, cpus=2, accounting=False)
        used = PLACES if todo else {}
        clusters = {name: stack.enter_context(Cluster.up(name, shape)) for name in used}
        conf = write_conf(folder, clusters)
        for repetition, case, here in todo:
            with ExitStack() as traffic:
                contended(clusters, repetition, traffic)
                run(case, conf, here)
            print(f"{here.name} done", flush=True)
    return True
