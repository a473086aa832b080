"""Whole runs through faults that a seed draws, in two scenes of the lab (needs root).

The machinery is that of the tests (`tests/worlds/campaign.py`). In the scene ``slurm``
(`tests/slurm/campaign.py`) one command trains on two clusters: kill -9 of every kind of process,
Slurm's daemons, nodes, jobs and disks. In the scene ``across`` (`tests/centres/campaign.py`) a
server and two centres share nothing: lines, hosts, processes and disks.

    python benchmarks/clusters/faults.py slurm|across [seed [faults [kind,kind...]]]

Writes into ``benchmarks/results/faults.json`` after every run, beside other campaigns: what was hit
when, what became of it, and whether the run ended with the weights of the undisturbed one, every
order done once and nothing left behind.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _machine import RESULTS, record
from centres.campaign import AcrossCentres
from lab.centres import missing_tun
from lab.host import missing
from slurm.campaign import OnClusters
from worlds.campaign import Campaign, summary

SCENES: dict[str, type[Campaign[Any]]] = {"slurm": OnClusters, "across": AcrossCentres}


def main(scene: str, seed: int = 0, count: int = 60, kinds: str = "") -> None:
    """Run, print and record."""
    if reason := missing() or missing_tun():
        print(f"skipped: {reason}")
        return
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.environ["FLWR_HPC_STATE"] = f"{folder}/state"
        with SCENES[scene](Path(folder)) as campaign:
            for outcome in campaign.outcomes(seed, count, kinds.split(",") if kinds else ()):
                outcomes.append(outcome)
                flaws = "; ".join(outcome.flaws) or "as undisturbed"
                print(f"run {outcome.seed}: {len(outcome.faults)} faults: {flaws}", flush=True)
                figures = summary(outcomes)
                _record(f"{scene}, seed {seed}", {"settings": campaign.settings, **figures})
    print({name: figure for name, figure in figures.items() if name != "each_run"})


def _record(name: str, figures: dict[str, Any]) -> None:
    """Write one campaign's figures, and leave the others'."""
    path = RESULTS / "faults.json"
    campaigns = json.loads(path.read_text())["campaigns"] if path.exists() else {}
    campaigns[name] = figures
    totals = {
        key: sum(campaign[key] for campaign in campaigns.values())
        for key in ("faults", "runs", "runs_without_a_flaw")
    }
    record("faults", {**totals, "campaigns": campaigns}, {})


if __name__ == "__main__":
    which, *given = sys.argv[1:]
    main(which, *(int(word) for word in given[:2]), *given[2:])
