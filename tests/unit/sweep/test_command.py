"""The command ``run -m`` finds mistakes before anything runs, and says what it would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from flwr_hpc import run
from flwr_hpc.sweep.folder import SweepDir

LEONARDO = ["+facility=leonardo", "facilities.leonardo.account=p"]


def test_dry_run_shows_points_and_node_hours(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects an account's budget: what all points may cost is known before."""
    shape = ["facilities.leonardo.nodes=2", "facilities.leonardo.walltime=00:30:00"]
    args = ["-m", "train.lr=1e-4,3e-4", "seed=1,2", *LEONARDO, *shape, "dry_run=true"]
    assert run.main(args) == 0
    out = capsys.readouterr().out
    assert "4 points" in out
    assert "003" in out
    assert "leonardo: at most 4.00 node-hours with one job per point" in out
    assert run.main([*args, "site.limits.node_hours=0.5"]) == 0
    assert "leonardo: at most 2.00 node-hours (site.limits.node_hours)" in capsys.readouterr().out
    assert run.main(["-m", "seed=1,2", "dry_run=true"]) == 0
    assert "no node-hours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["seed=1"], "no setting has several"),
        (["seed=range(200)"], "200 points are more than sweep.max_points=100.*max_points=200"),
        (["train.lrr=1,2"], "Did you mean 'lr'?"),
        (["train.lr=1e-3,-1"], "train.lr=-1.0 must be greater than zero"),
        (["seed=1,2", "serve.address=h:1"], "leave serve.address out"),
        (["seed=1,2", "sweep.size=1"], "Valid keys: dir, parallel, ranks_per_point, max_points"),
        (["seed=1,2", "+facility=local_a", "data.paths.local_a=[no_such]"], "no_such"),
        (["seed=1,2", "--cfg", "job"], "--cfg shows one run's settings; leave -m out"),
        (["resume=nowhere"], "nowhere is not the folder of a sweep: it holds no points.json"),
    ],
)
def test_mistakes_end_it_before_anything_runs(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Protects hours of points from a key that the last of them would stumble over."""
    monkeypatch.chdir(tmp_path)
    assert run.main(["-m", *args]) == 2
    error = capsys.readouterr().err
    for part in message.split(".*"):
        assert part in error
    assert not any(tmp_path.iterdir())


def test_options_of_a_sweep_without_m_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects from one run where many were meant."""
    assert run.main(["train.lr=1e-3", "sweep.parallel=2"]) == 2
    assert "'sweep.parallel=2' is for a sweep. Add -m" in capsys.readouterr().err


def test_points_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects points in one allocation from getting no GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    here = [*LEONARDO, "facilities.leonardo.scheduler=local", "facilities.leonardo.gpus_per_node=2"]
    args = ["-m", "seed=1,2,3", *here, "dry_run=true"]
    assert run.main([*args, "sweep.parallel=3"]) == 2
    assert "Give sweep.parallel=2" in capsys.readouterr().err
    assert run.main([*args, "sweep.parallel=2"]) == 0


def test_a_resumed_sweep_needs_no_m_and_takes_no_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects the points of a sweep; finished ones are not run again."""
    folder = SweepDir(tmp_path / "s")
    for point in folder.add([["seed=1"], ["seed=2"]], None):
        folder.end(point, 0)
    assert run.main([f"resume={folder.path}", "rounds=9"]) == 2
    assert f"repeat the whole command with sweep.dir={folder.path}" in capsys.readouterr().err
    assert run.main([f"resume={folder.path}"]) == 0
    assert "2 of 2 points have ended before" in capsys.readouterr().out
    assert not folder.log(folder.points()[0]).exists()


def test_a_command_runs_the_points_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects the rest of a sweep from being run by a command that asks for a part of it."""
    folder = SweepDir(tmp_path / "s")
    first, _ = folder.add([["seed=1"], ["seed=2"]], None)
    folder.end(first, 0)
    assert run.main(["-m", "seed=choice(1)", f"sweep.dir={folder.path}"]) == 0
    assert "1 of 1 points have ended before" in capsys.readouterr().out
    assert [p.code for p in folder.points()] == [0, None]
