"""A host that is reached by SSH: what is typed for it, and what its errors say."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from flwr_hpc import __version__
from flwr_hpc.doctor import __main__ as doctor
from flwr_hpc.errors import UserError
from flwr_hpc.ssh import host as module
from flwr_hpc.ssh.host import SshHost, SshLostError, control_folder
from flwr_hpc.ssh.python_there import PythonThere

SCRIPT = """#!/bin/sh
echo "$@" >> "$0.calls"
echo "some banner" >&2
echo "{last}" >&2
exit 255
"""


def _ssh(monkeypatch: pytest.MonkeyPatch, folder: Path, last: str) -> Path:
    """Put an ssh in place that cannot connect."""
    program = folder / "ssh"
    program.write_text(SCRIPT.format(last=last))
    program.chmod(0o755)
    monkeypatch.setattr(module, "PROGRAM", str(program))
    return folder / "ssh.calls"


@pytest.mark.parametrize("name", ["-oProxyCommand=sh", "", "a b", "x;y", "$(id)"])
def test_a_name_is_no_option(name: str, tmp_path: Path) -> None:
    """Protects from a setting that would be an option, or a command, of ssh's."""
    with pytest.raises(UserError, match="is no name of a host"):
        SshHost(name, tmp_path)


def test_what_takes_a_person_is_said_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects who has to give a second factor: the very command to type."""
    calls = _ssh(monkeypatch, tmp_path, "user@far: Permission denied (publickey).")
    host = SshHost("far", tmp_path, "my config")
    with pytest.raises(SshLostError) as error:
        host.open(ask=False)
    assert "Permission denied (publickey). To connect, type: " in str(error.value)
    assert f"-F '{Path.cwd()}/my config'" in str(error.value)
    assert f"-S {tmp_path}/" in str(error.value)
    assert "BatchMode=yes" in calls.read_text()
    assert "BatchMode" not in str(error.value)


def test_what_a_second_factor_asks_for_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Protects who has to open a page and type a code there: ssh writes that to stderr."""
    _ssh(monkeypatch, tmp_path, "open https://login.example.org and type ABC")
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True)
    host = SshHost("far", tmp_path)
    with pytest.raises(SshLostError):
        host.open(ask=True)
    assert "type ABC" in capfd.readouterr().err
    with pytest.raises(SshLostError, match="type ABC"):
        host.open(ask=False)
    assert "type ABC" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "last",
    [
        "ssh: connect to host far port 22: Connection timed out",
        "ssh: Could not resolve hostname far: Temporary failure in name resolution",
        "Connection closed by UNKNOWN port 65535",
    ],
)
def test_what_passes_by_itself_asks_nobody(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from asking for what no person can give."""
    _ssh(monkeypatch, tmp_path, last)
    with pytest.raises(SshLostError, match=r"trying again$"):
        SshHost("far", tmp_path).open(ask=False)


def test_sockets_of_a_run_lie_where_they_lay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the command that a person was told, and sockets' short names; nobody else's."""
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = control_folder("a long key of a run")
    assert folder == control_folder("a long key of a run") != control_folder("another")
    assert len(folder.name) + len(folder.parent.name) < 40
    assert {stat.S_IMODE(p.stat().st_mode) for p in (folder, folder.parent)} == {0o700}
    assert SshHost("far", folder).hint == SshHost("far", folder).hint


def test_a_folder_of_sockets_that_is_anothers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the connection from who made the folder before."""
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f"flwr-hpc-ssh-{os.getuid()}").write_text("no folder")
    with pytest.raises(UserError, match="TMPDIR"):
        control_folder("key")


@pytest.mark.parametrize(
    ("version", "package", "words"),
    [
        ("3.9.2", "", "is Python 3.9.2, and flwr-hpc needs 3.11 or newer"),
        ("3.12.1", "", "has no flwr-hpc, and the run needs"),
        ("3.12.1", "0.0.9", "has flwr-hpc 0.0.9, and the run needs"),
    ],
)
def test_a_python_that_does_not_fit(version: str, package: str, words: str) -> None:
    """Protects from a site that would start and fail: what is there, and the command."""
    fault = PythonThere("/opt/py", version, "uan01", "/home/me", package).fault("far")
    assert words in fault
    if version == "3.12.1":
        assert "ssh far '/opt/py -m pip install " in fault
        assert f"{__version__}-py3" in fault


def test_a_python_that_fits() -> None:
    """Protects from refusing what is right."""
    assert not PythonThere("/opt/py", "3.13.0", "uan01", "/home/me", __version__).fault("far")


def test_doctor_takes_no_other_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects who mistypes a key of the doctor's."""
    assert doctor.main(["ssh=far", "phyton=/x"]) == 2
    assert "'phyton' says nothing about a host" in capsys.readouterr().err
