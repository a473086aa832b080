"""A dozen faults over whole runs, by a seed; `benchmarks/clusters/faults.py` does many more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lab.fixtures import Lab
from slurm.campaign import OnClusters

SEED, FAULTS = 1, 12


@pytest.mark.slurm
@pytest.mark.slow
def test_runs_come_through_a_dozen_faults(lab: Lab, tmp_path: Path) -> None:
    """Protects whole runs: done, no order's work twice, nothing left, the undisturbed weights."""
    names = [f"t{os.getpid()}_fault_{letter}" for letter in "ab"]
    with OnClusters(tmp_path, names) as campaign:
        outcomes = list(campaign.outcomes(SEED, FAULTS))
    assert sum(len(outcome.faults) for outcome in outcomes) == FAULTS
    assert [(outcome.flaws, outcome.faults) for outcome in outcomes if outcome.flaws] == []
