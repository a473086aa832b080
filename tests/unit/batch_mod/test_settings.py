"""Which facility a message goes to, and how mistakes are told."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from worlds.site.batch_app import make_context

from flwr_hpc.batch_mod.compose import settle
from flwr_hpc.batch_mod.settings import gather
from flwr_hpc.errors import UserError


def test_the_node_wins_over_the_run_over_the_code() -> None:
    """Protects one app for many facilities: each SuperNode says where it is."""
    run = {"flwr-hpc.facility": "slurm", "flwr-hpc.walltime": "00:20:00", "flwr-hpc.account": ""}
    node = {"flwr-hpc.facility": "leonardo", "flwr-hpc.env.A-B": "1", "partition-id": 3}
    context = Context(1, 2, node, RecordDict(), run)
    given = {"facility": None, "account": "coded", "walltime": "00:10:00", "partition": None}
    assert gather(given, context) == {
        "facility": "leonardo",
        "account": "coded",
        "walltime": "00:20:00",
        "partition": None,
        "env.A-B": "1",
    }


@pytest.mark.parametrize(
    ("code", "node", "account"),
    [
        ({}, {}, "mine (from SBATCH_ACCOUNT)"),
        ({"account": None}, {}, "none"),
        ({}, {"flwr-hpc.account": "none"}, "none"),
        ({}, {"flwr-hpc.account": ""}, "mine (from SBATCH_ACCOUNT)"),
        ({"account": "p1"}, {"flwr-hpc.account": "none"}, "none"),
        ({"account": None}, {"flwr-hpc.account": "p2"}, "p2"),
    ],
)
def test_no_account_is_not_the_same_as_none_given(
    code: dict[str, Any], node: dict[str, Any], account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects clusters without accounts, and `batch("leonardo")` as the page shows it."""
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    settings = settle(gather({"facility": "leonardo", **code}, make_context(**node)))
    assert settings.account == account
    assert settings.facility.account == (None if account == "none" else account.split()[0])


def test_one_process_gets_what_the_ranks_of_a_node_would() -> None:
    """Protects an app that knows nothing of ranks from a quarter of the CPUs, or four calls."""
    settings = settle({"facility": "leonardo", "account": "x"})
    f = settings.facility
    assert (f.ranks_per_node, f.gpus_per_node, f.cpus_per_rank) == (1, 4, 32)
    assert settings.allocation.renew_ahead == "off"
    f = settle({"facility": "leonardo", "account": "x", "ranks_per_node": 2}).facility
    assert (f.ranks_per_node, f.cpus_per_rank) == (2, 8)


def test_values_survive_as_they_are(tmp_path: Path) -> None:
    """Protects paths with spaces, shell lines with quotes, and keys of open mappings."""
    lines = ['module load "x y"', "export A='[1,2]', B={c}", "# $HOME \\ "]
    settings = settle(
        {
            "facility": "slurm",
            "account": "A-1, b",
            "workdir": f"{tmp_path}/a b",
            "setup": lines,
            "env": {"X": "1,2"},
            "env.Y": "a b",
            "idle_timeout_s": 7,
            "partition": None,
        }
    )
    f = settings.facility
    assert (f.account, f.workdir, f.setup) == ("A-1, b", f"{tmp_path}/a b", lines)
    assert f.env == {"X": "1,2", "Y": "a b"}
    assert settings.allocation.idle_timeout_s == 7


def test_own_facility_file(tmp_path: Path) -> None:
    """Protects facilities that are not in the package."""
    (tmp_path / "facility").mkdir()
    text = "# @package facilities.mine\nscheduler: local\nwalltime: '00:07:00'\n"
    (tmp_path / "facility" / "mine.yaml").write_text(text)
    settings = settle({"facility": "mine", "config_dir": str(tmp_path)})
    assert settings.facility.walltime == "00:07:00"


def test_another_shape_of_job_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Protects training on four nodes from an evaluation that asked for one."""
    one, two = (
        settle({"facility": "slurm", "account": "x", "workdir": str(tmp_path), "nodes": n})
        for n in (1, 2)
    )
    context = make_context()
    assert one.root(context) != two.root(context)
    assert one.run_key(context) != two.run_key(context)
    assert one.root(context).parent == tmp_path / "flwr-hpc-batch" / "11" / "7"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["flwr_hpc.batch('NAME')", "--node-config", '"none"']),
        ({"facility": "leonrado"}, ["no facility 'leonrado'", "'leonardo'", "Known: alps"]),
        ({"facility": "leonardo"}, ["account must be given", "account=NAME", "flwr-hpc.KEY"]),
        (
            {"facility": "slurm", "account": "x", "python": "{stub}"},
            ["lacks submitit, flwr", "-m pip install 'flwr-hpc'", "python=/path/to/python"],
        ),
        ({"facility": "leonardo", "acount": "x"}, ["unknown setting 'acount'", "'account'"]),
        (
            {"facility": "leonardo", "account": "x", "walltime": "99:00:00"},
            ["at most 00:30:00", "walltime=00:30:00"],
        ),
        ({"facility": "slurm", "account": "x", "nodes": "many"}, ["nodes", "many"]),
    ],
)
def test_mistakes_are_told_in_terms_of_the_mod(
    given: dict[str, str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects users from advice for another command line, and from waits in vain."""
    for name in ("SBATCH_ACCOUNT", "SLURM_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/bin")
    if "python" in given:
        stub = tmp_path / "python"
        stub.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')
        stub.chmod(0o755)
        given = given | {"python": str(stub)}
    with pytest.raises(UserError) as caught:
        settle(given)
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "facilities." not in said
    assert "to the command" not in said
