"""Which account a job is charged to when none is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from flwr_hpc import run
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.accounts import find_account, settle_accounts

KEY = "facilities.here.account"
# What sacctmgr of Slurm 22.05.8 printed for `sacctmgr -nP show assoc user=NAME format=account`
# on 2026-11-21, and its exit code: one association, two of them, none, a cluster without slurmdbd,
# a slurmdbd that is away.
ONE = ("others\n", "", 0)
TWO = ("lab\ncapped\n", "", 0)
NO_ASSOCIATION = ("", "", 0)
NO_SLURMDBD = (
    "",
    "You are not running a supported accounting_storage plugin\n"
    "Only 'accounting_storage/slurmdbd' is supported.\n",
    1,
)
AWAY = (
    "",
    "sacctmgr: error: slurm_persist_conn_open_without_init: failed to open persistent connection "
    "to host:198.18.7.1:6819: Connection refused\n"
    "sacctmgr: error: Sending PersistInit msg: Connection refused\n",
    1,
)


@pytest.fixture(autouse=True)
def _nobody_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SBATCH_ACCOUNT", "SLURM_ACCOUNT", "PBS_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")


def _sacctmgr(tmp_path: Path, answer: tuple[str, str, int]) -> Path:
    """Put a sacctmgr in PATH that answers so, and writes down what it was asked."""
    out, err, code = answer
    program, asked = tmp_path / "bin" / "sacctmgr", tmp_path / "asked"
    lines = [
        "#!/bin/sh", f'echo "$@" >>"{asked}"', f"printf %s '{out}'",
        f"cat >&2 <<'END'\n{err}END", f"exit {code}",
    ]  # fmt: skip
    program.write_text("\n".join(lines) + "\n")
    program.chmod(0o755)
    return asked


def test_the_environment_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the account that sbatch itself would take; the cluster is not asked."""
    asked = _sacctmgr(tmp_path, ONE)
    monkeypatch.setenv("SLURM_ACCOUNT", "second")
    assert str(find_account("here", FacilityConfig())) == "second (from SLURM_ACCOUNT)"
    monkeypatch.setenv("SBATCH_ACCOUNT", "first")
    assert str(find_account("here", FacilityConfig())) == "first (from SBATCH_ACCOUNT)"
    monkeypatch.setenv("PBS_ACCOUNT", "third")
    assert str(find_account("here", FacilityConfig("pbs"))) == "third (from PBS_ACCOUNT)"
    assert not asked.exists()


def test_what_is_given_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a choice, and a cluster without accounts, from the environment."""
    asked = _sacctmgr(tmp_path, TWO)
    monkeypatch.setenv("SBATCH_ACCOUNT", "other")
    assert str(find_account("here", FacilityConfig(account="mine"))) == "mine"
    assert find_account("here", FacilityConfig(account=None)).name is None
    assert find_account("here", FacilityConfig(account="none")).name is None
    assert find_account("here", FacilityConfig("local")).name is None
    assert not asked.exists()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ONE, "others (your only one, says sacctmgr)"),
        (NO_ASSOCIATION, "none (sacctmgr shows none of yours)"),
        (NO_SLURMDBD, "none (the cluster keeps none, says sacctmgr)"),
    ],
)
def test_the_cluster_is_asked(answer: tuple[str, str, int], words: str, tmp_path: Path) -> None:
    """Protects the first command of a new user from a question that the cluster can answer."""
    asked = _sacctmgr(tmp_path, answer)
    account = find_account("here", FacilityConfig(), user="me")
    assert str(account) == words
    assert asked.read_text() == "-nP show assoc user=me format=account\n"


@pytest.mark.parametrize(
    ("scheduler", "answer", "words"),
    [
        ("slurm", TWO, ["several accounts: lab, capped", f"Add to the command: {KEY}=lab"]),
        ("slurm", AWAY, [f"{KEY} must be given", "Connection refused", f"{KEY}=NAME"]),
        ("slurm", None, ["SBATCH_ACCOUNT and SLURM_ACCOUNT not set", "not found on this host"]),
        ("pbs", None, [f"{KEY} must be given: PBS_ACCOUNT not set", f"{KEY}=null where"]),
    ],
)
def test_a_doubt_is_the_users(
    scheduler: str,
    answer: tuple[str, str, int] | None,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Protects the user's budgets: nothing is charged to an account that was guessed."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    if answer is not None:
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        _sacctmgr(tmp_path, answer)
    with pytest.raises(UserError) as caught:
        find_account("here", FacilityConfig(scheduler))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_every_facility_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects job scripts from the word that stands for the user's own account."""
    monkeypatch.setenv("SBATCH_ACCOUNT", "first")
    facilities = {"a": FacilityConfig(), "b": FacilityConfig(account="mine")}
    assert [str(a) for a in settle_accounts(facilities).values()] == [
        "first (from SBATCH_ACCOUNT)",
        "mine",
    ]
    assert [f.account for f in facilities.values()] == ["first", "mine"]


def test_the_first_command_on_leonardo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects who types `+facility=leonardo` and nothing else: the demo, in the debug queue."""
    _sacctmgr(tmp_path, ("EUHPC_X01\nEUHPC_X01\n", "", 0))
    assert run.main(["+facility=leonardo", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "leonardo: account EUHPC_X01 (your only one, says sacctmgr)\n" in out
    for line in ("account=EUHPC_X01", "qos=boost_qos_dbg", "time=00:30:00", "nodes=1"):
        assert f"\n#SBATCH --{line}\n" in out
    assert "110" in out
    assert "stdlib" in out
