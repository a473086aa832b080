"""Whole runs through faults that a seed draws, on real Slurm clusters.

The machinery is that of the tests (`tests/slurm/campaign.py`; needs root): two clusters of the lab,
the real trainer, kill -9 of every kind of process, Slurm's daemons, nodes, jobs and disks.

    python benchmarks/clusters/faults.py [seed [faults [kind,kind...]]]

Writes ``benchmarks/results/faults.json`` after every run: what was hit when, what became of it, and
whether the run ended with the weights of the undisturbed one, every order done once and nothing
left behind.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _machine import record
from lab.host import missing
from slurm.campaign import SETTINGS, Campaign, summary
from slurm.fault_kinds import KINDS


def main(seed: int = 0, count: int = 60, kinds: str = ",".join(KINDS)) -> None:
    """Run, print and record."""
    if reason := missing():
        print(f"skipped: {reason}")
        return
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.environ["FLWR_HPC_STATE"] = f"{folder}/state"
        with Campaign(Path(folder)) as campaign:
            for outcome in campaign.outcomes(seed, count, kinds.split(",")):
                outcomes.append(outcome)
                flaws = "; ".join(outcome.flaws) or "as undisturbed"
                print(f"run {outcome.seed}: {len(outcome.faults)} faults: {flaws}", flush=True)
                figures = summary(outcomes)
                record("faults", figures, {"seed": seed, "faults": count, "settings": SETTINGS})
    print({name: figure for name, figure in figures.items() if name != "each_run"})


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*(int(word) for word in given[:2]), *given[2:])
