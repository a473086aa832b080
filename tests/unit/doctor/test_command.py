"""`python -m flwr_hpc.doctor` as it is typed: errors, output, exit codes, signals."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from rich.console import Console
from worlds.clock import FakeClock
from worlds.site.doctor import FakeOutside, FakeScheduler

from flwr_hpc.doctor import __main__ as command
from flwr_hpc.doctor import examine
from flwr_hpc.doctor.findings import Checks, Finding, failed, passed
from flwr_hpc.doctor.show import as_json, show, verdict
from flwr_hpc.errors import UserError

ROOT = Path(__file__).parents[3]
SLURM = ["+facility=slurm", "facilities.slurm.account=p"]


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeScheduler:
    """A login node that is well; its queue never moves."""
    monkeypatch.chdir(tmp_path)
    fake = FakeScheduler()
    monkeypatch.setattr(examine, "make_scheduler", lambda facility: fake)
    monkeypatch.setattr(examine, "Outside", lambda env: FakeOutside())
    monkeypatch.setattr(command, "SystemClock", FakeClock)
    return fake


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the facility to look at, e.g. +facility=local_a. Known: alps"),
        (["rounds=3"], "name the facility"),
        (["+facility=leonard"], "leonardo"),
        (["+facility=leonardo"], "facilities.leonardo.account must be given"),
        (["+facility=leonardo", "facilities.leonardo.nods=1"], "nods"),
        ([*SLURM, "--timeout", "soon"], "--timeout soon is neither minutes nor HH:MM:SS"),
        ([*SLURM, "--timeout", "0"], "--timeout 0 must be longer than zero"),
        ([*SLURM, "--nodes", "0"], "--nodes 0 must be at least 1"),
        ([*SLURM, "--bandwidth", "--no-job"], "--bandwidth is measured in a job"),
        (["ssh=far", "--bandwidth"], "python -m flwr_hpc.doctor --bandwidth +facility=NAME"),
        (
            [*SLURM, "--bandwidth", "--nodes", "1", "facilities.slurm.ranks_per_node=1"],
            "the job at slurm has one. Give it more",
        ),
        ([*SLURM, "--config-dir", "/nowhere"], "there is no such folder"),
        ([*SLURM, "facilities.slurm.ssh=far"], "facility 'slurm' is on far: look at it there"),
    ],
)
def test_mistakes_of_the_user(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects who mistypes: one message with the way out, exit code 2, nothing submitted."""
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err


def test_without_a_job(
    scheduler: FakeScheduler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects --no-job and --json: valid, complete, nothing submitted or written."""
    first, *rest = SLURM
    assert command.main([first, "--no-job", "--json", *rest]) == 0  # options in between
    body = json.loads(capsys.readouterr().out)
    assert body["ok"] is True
    last = body["facilities"]["slurm"][-1]
    assert (last["name"], last["status"], last["observed"]) == ("probe job", "skipped", "--no-job")
    assert (scheduler.submitted, list(tmp_path.iterdir())) == ([], [])


def test_a_failed_check_spares_the_queue(
    scheduler: FakeScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects from a job that would fail: exit code 1, in words, nothing submitted."""
    scheduler.error = UserError("refused: Invalid account")
    assert command.main(SLURM) == 1
    out = capsys.readouterr().out
    assert "fail    account and limits: refused: Invalid account\n          -> facilities." in out
    assert "skipped probe job: a check above failed" in out
    assert not scheduler.submitted


def test_a_queue_that_does_not_move(
    scheduler: FakeScheduler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects from waiting for ever: the deadline, the job's end, what is left."""
    assert command.main([*SLURM, "--timeout", "00:10:00"]) == 1
    assert "no sign of life after 10 min" in capsys.readouterr().out
    assert (scheduler.cancelled, list(tmp_path.iterdir())) == (["7"], [])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_job_first(
    scheduler: FakeScheduler,
    tmp_path: Path,
    signum: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Protects budgets from Ctrl-C, kill and lost connections while the probe is queued."""

    class Interrupted(FakeClock):
        def sleep(self, seconds: float) -> None:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    monkeypatch.setattr(command, "SystemClock", Interrupted)
    assert command.main([*SLURM, "--json"]) == 128 + signum
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] is False
    assert "stopped; probe job cancelled: 7" in err
    assert (scheduler.cancelled, list(tmp_path.iterdir())) == (["7"], [])
    assert signal.getsignal(signum) is before


def test_a_job_that_could_not_be_ended_is_named(
    scheduler: FakeScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects budgets when the scheduler is away at the end."""
    scheduler.deaf = True
    assert command.main([*SLURM, "--timeout", "1"]) == 1
    assert "may still be queued or run" in capsys.readouterr().err


def test_dry_run_shows_the_script(
    scheduler: FakeScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects who wants to see the job before it is submitted."""
    assert command.main([*SLURM, "dry_run=true"]) == 0
    assert capsys.readouterr().out == "# probe job of slurm\n#!/bin/bash\n\n"
    assert not scheduler.submitted


def documented() -> list[list[str]]:
    """Return the arguments of every command on the doctor's page."""
    page = (ROOT / "docs" / "doctor.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^python -m flwr_hpc.doctor(.*)$", page, flags=re.MULTILINE)
    return [shlex.split(arguments, comments=True) for arguments in found]


@pytest.mark.parametrize("arguments", documented(), ids=" ".join)
def test_documented_commands(
    arguments: list[str],
    scheduler: FakeScheduler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Protects readers from commands that are refused."""
    own = tmp_path / "my-conf" / "facility" / "mycluster.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package facilities.mycluster\naccount: p\n")
    monkeypatch.setenv("SBATCH_ACCOUNT", "PROJECT")  # as on a login node of yours
    assert command.main([*arguments, "dry_run=true"]) == 0


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    """Protects a doctor from another one's job and files."""
    config = command.compose_config([*SLURM, f"facilities.slurm.workdir={tmp_path}"])
    first, second = (examine.patient(config, "slurm", FakeClock(), 60.0, 2) for _ in range(2))
    assert first.probe.spec.name != second.probe.spec.name
    assert first.probe.spec.folder != second.probe.spec.folder
    assert first.probe.spec.folder.is_relative_to(tmp_path / "flwr-hpc")


def test_what_is_needed_comes_first() -> None:
    """Protects readers from the consequences of one fault told as many."""
    checks: Checks[None] = Checks("here")
    checks("a")(lambda _: failed("no", "fix it"))
    for name in "bcd":
        checks(name, needs=["a"])(lambda _: passed("never made"))
    findings = checks.run(None)
    assert [f.observed for f in findings] == ["no", *["needs: a"] * 3]
    for terminal in (False, True):
        out = io.StringIO()
        show(Console(file=out, force_terminal=terminal, width=100), "x", findings)
        assert "3 more checks" in out.getvalue()
        assert "fix it" in out.getvalue()
        assert "[" not in out.getvalue() or terminal
    assert verdict({"x": findings}) == "1 failed, 3 skipped"
    assert json.loads(as_json({"x": findings}))["ok"] is False


def test_markup_in_what_was_found_is_text() -> None:
    """Protects messages with brackets from being taken for colours."""
    odd = [Finding("fail", "a[red]b", "'x=[y]'", "n", "w")]
    for terminal in (False, True):
        out = io.StringIO()
        show(Console(file=out, force_terminal=terminal, width=100), "x", odd)
        assert "a[red]b" in out.getvalue()
        assert "'x=[y]'" in out.getvalue()
