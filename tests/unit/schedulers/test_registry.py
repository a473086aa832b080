"""Batch systems are found by being there, in the package or outside; rules are their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from worlds.jobs import facility, register_dummy

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import Scheduler
from flwr_hpc.schedulers.registry import check_facility, make_scheduler, names, rules_of
from flwr_hpc.schedulers.rules import NATIVE

ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "flwr_hpc").rglob("*.py"))


def test_the_folders_are_the_list() -> None:
    """Protects the seam: a folder is a batch system, and each has rules and an adapter."""
    folders = {p.parent.name for p in (ROOT / "flwr_hpc" / "schedulers").glob("*/adapter.py")}
    assert names() == sorted(folders)
    for name in folders:
        of = FacilityConfig(name, None)
        assert rules_of(of).title
        assert set(rules_of(of).fields) <= set(NATIVE)
        assert set(rules_of(of).instead) <= set(NATIVE) - set(rules_of(of).fields)
        assert callable(make_scheduler(of).submit)


def test_one_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects batch systems of other packages: adapter, rules and template of their own."""
    before = names()
    where = facility("dummy", tmp_path, monkeypatch)
    assert names() == sorted([*before, "dummy"])
    check_facility("mine", where)
    scheduler: Scheduler = make_scheduler(where)
    assert type(scheduler).__module__ == "worlds.schedulers.dummy_scheduler.adapter"
    where.qos = "high"
    with pytest.raises(UserError) as caught:
        check_facility("mine", where)
    assert str(caught.value) == (
        "facilities.mine.qos=high has no meaning with scheduler=dummy. Leave it out: the dummy "
        "serves first who comes first"
    )


def test_every_command_names_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects users from a typing error, in a process of its own, also before a job script."""
    register_dummy(tmp_path, monkeypatch)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests"), str(ROOT)])
    typed = ["+facility=slurm", "facilities.slurm.account=p", "facilities.slurm.scheduler=dumy"]
    for command in (["run", "--cfg", "job"], ["run", "dry_run=true"], ["doctor", "--no-job"]):
        done = subprocess.run(
            [sys.executable, "-m", f"flwr_hpc.{command[0]}", *typed, *command[1:]],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 2, done
        assert (
            "facilities.slurm.scheduler=dumy is not known. Did you mean 'dummy'? "
            f"Valid: {', '.join(names())}."
        ) in " ".join(done.stderr.split())


def test_an_unknown_batch_system_is_no_traceback() -> None:
    """Protects a site whose server knows a batch system that is not installed here."""
    with pytest.raises(UserError, match=r"=lsf is not known\..*Valid: .*local, pbs, slurm\."):
        make_scheduler(FacilityConfig("lsf", None))


def test_no_batch_system_is_named_elsewhere() -> None:
    """Protects the seam: outside its folder no code asks which batch system it is."""
    asks = re.compile(r"scheduler\s*(==|!=|in)\s|[\"'](slurm|pbs)[\"']\s*(==|!=|:)")
    for path in SOURCES:
        if "schedulers" not in path.parts:
            found = [line for line in path.read_text().splitlines() if asks.search(line)]
            assert not [x for x in found if "LOCAL" not in x], f"{path}: {found}"
