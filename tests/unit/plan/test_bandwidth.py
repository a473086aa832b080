"""Measured bandwidths: kept for the user, taken by plans, said to be measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flwr_hpc.config.facility import BandwidthConfig, FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.plan.__main__ import main
from flwr_hpc.plan.bandwidth import (
    MeasuredBandwidths,
    MeasuredRow,
    bandwidths,
    keep,
    kept,
    measured_file,
    placements,
)

ROWS = [
    MeasuredRow(1, 2, 100.0, 50.0, 100.0), MeasuredRow(1, 4, 80.0, 80.0, 80.0),
    MeasuredRow(2, 2, 60.0, 60.0, 60.0), MeasuredRow(4, 2, 5.0, 5.0, 5.0),
]  # fmt: skip
MEASURED = MeasuredBandwidths(
    "leonardo", "2026-11-22T15:00:00+00:00", "2.13.0", "A100, NCCL", ["n1", "n2", "n3"], 4, 4, ROWS
)
PLAN = ["model=llama3_8b", "+facility=leonardo", "nodes=2"]


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the tables of whoever runs the tests out of them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_every_placement_of_groups() -> None:
    """Protects plans from groups that were not measured: all that share the ranks evenly."""
    assert placements(8) == [(1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2)]
    assert placements(6) == [(1, 2), (1, 3), (1, 6), (2, 3), (3, 2)]
    assert placements(1) == []


def test_one_number_of_three_collectives() -> None:
    """Protects the time of equal volumes by each: 1/100 + 1/50 + 1/100 s for 3 GB."""
    assert ROWS[0].gb_s == pytest.approx(75.0)
    assert ROWS[1].gb_s == pytest.approx(80.0)


def test_a_measured_table_comes_first() -> None:
    """Protects what was measured from the numbers that stand in for it; the rest stays."""
    f = FacilityConfig(ranks_per_node=4, gpus_per_node=4)
    f.bandwidths = [BandwidthConfig(1, 2, 9.0), BandwidthConfig(1, 8, 7.0)]
    table, assumed = bandwidths(f)
    assert (table.gb_s(1, 2), len(assumed)) == (9.0, 1)
    table, assumed = bandwidths(f, MEASURED)
    assert table.gb_s(1, 2) == pytest.approx(75.0)
    assert table.gb_s(4, 2) == pytest.approx(5.0)
    assert table.gb_s(1, 8) == 7.0
    assert assumed == [], "nothing is assumed that was measured"
    assert len(bandwidths(replace(f, bandwidths=[]))[1]) == 2


def test_the_plan_goes_by_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects users: a slow network that was measured changes the plan, and it says so."""
    assert main(PLAN) == 0
    assumed = " ".join(capsys.readouterr().out.split())
    said = "to measure: python -m flwr_hpc.doctor --bandwidth +facility=leonardo"
    assert said in assumed
    assert keep(MEASURED) == measured_file("leonardo")
    assert kept("leonardo") == MEASURED
    assert main(PLAN) == 0
    slow = " ".join(capsys.readouterr().out.split())
    assert "measured on 2026-11-22 on n1, n2 and 1 more (A100, NCCL, torch 2.13.0)" in slow
    assert slow.split("why")[1][:200] != assumed.split("why")[1][:200], "the same numbers"


def test_a_table_of_other_nodes_is_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects from placements that mean other places: with two ranks per node, 2 is the next."""
    keep(MEASURED)
    assert main([*PLAN, "facilities.leonardo.ranks_per_node=2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "leonardo.json is of ranks_per_node=4 gpus_per_node=4 and not used" in said


@pytest.mark.parametrize("text", ["{", "[]", '{"facility": "leonardo"}', '{"rows": 3}'])
def test_a_damaged_table(text: str) -> None:
    """Protects from a traceback: the file, and how to measure anew."""
    path = measured_file("leonardo")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError, match=r"leonardo\.json.* --bandwidth \+facility=leonardo"):
        kept("leonardo")


def test_where_it_cannot_be_kept(config_home: Path) -> None:
    """Protects a measurement: what to do where the home folder is read-only."""
    (config_home / "flwr-hpc").write_text("a file")
    with pytest.raises(UserError, match="export XDG_CONFIG_HOME=DIR"):
        keep(MEASURED)
