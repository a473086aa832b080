"""A host behind a real sshd: one connection, files, programs that stay, ports, the doctor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from worlds.jobs import until
from worlds.network.sshd import Sshd, needs_sshd, sshd
from worlds.runs.run import ROOT

from flwr_hpc.errors import UserError
from flwr_hpc.ssh.host import PortTakenError, SshHost, SshLostError
from flwr_hpc.ssh.python_there import install, look
from flwr_hpc.ssh.wire import measure

pytestmark = needs_sshd


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("ein Übergang")) as server:
        yield server


@pytest.fixture
def host(far: Sshd, tmp_path: Path) -> Iterator[SshHost]:
    host = SshHost("far", tmp_path, str(far.config))
    host.open(ask=False)
    yield host
    host.close()


def test_files_are_for_their_user_alone(host: SshHost, tmp_path: Path) -> None:
    """Protects an invitation on its way, in folders with any name and under any umask."""
    path = tmp_path / "ein Ordner" / "invitation.json"
    before = os.umask(0)
    try:
        host.put("Straße".encode(), str(path))
    finally:
        os.umask(before)
    assert path.read_text() == "Straße"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_lost_connection_is_no_error_of_the_program(host: SshHost) -> None:
    """Protects from taking a site for broken that cannot be reached."""
    with pytest.raises(UserError, match="no such thing"):
        host.run(["sh", "-c", "echo no such thing >&2; exit 3"])
    with pytest.raises(UserError, match="failed"):  # ssh's own code, the connection stands
        host.run(["sh", "-c", "exit 255"])
    host.close()
    with pytest.raises(SshLostError):
        host.run(["true"])
    host.open(ask=False)
    assert host.run(["echo", "a b  c"]) == "a b  c\n"


def test_a_python_without_flwr_hpc_is_given_it(
    host: SshHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects whoever has an environment there and no flwr-hpc, or another version, in it."""
    program = _python_without_flwr_hpc(tmp_path / "ein Python")
    there = look(host, program)
    assert (there.flwr_hpc, there.lacks_package) == ("", True)
    there = replace(there, home=str(tmp_path / "home"))
    assert install(host, there).fault("far") == ""
    monkeypatch.setattr("flwr_hpc.ssh.python_there.__version__", "0.0.9")
    assert look(host, program).lacks_package


def _python_without_flwr_hpc(folder: Path) -> str:
    """Make an environment that has what flwr-hpc needs."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    needed = folder / "needed"
    needed.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not re.match("_*(flwr_hpc|editable)", path.name):
            (needed / path.name).symlink_to(path)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "needed.pth").write_text(str(needed))
    return str(folder / "bin" / "python")


def test_a_port_is_had_again(far: Sshd, host: SshHost, tmp_path: Path) -> None:
    """Protects a site that knows one port: it is the same after the connection was lost."""
    wire = measure(host, sys.executable)
    assert min(wire.from_there, wire.to_there) > 0
    port = host.expose(far.port)
    (tmp_path / "2").mkdir()
    other = SshHost("far", tmp_path / "2", str(far.config))
    other.open(ask=False)
    try:
        with pytest.raises(PortTakenError, match=str(port)):
            other.expose(far.port, port)
        host.close()
        until(lambda: _has(other, far.port, port), tmp_path)
    finally:
        other.close()


def _has(host: SshHost, port: int, there: int) -> bool:
    """Whether it could be had: the other end learns in its own time that a connection is over."""
    try:
        return host.expose(port, there) == there
    except PortTakenError:
        return False


def _doctor(far: Sshd, *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    command = [sys.executable, "-m", "flwr_hpc.doctor", "--json", "ssh=far", *words]
    command.append(f"ssh_config={far.config}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)["facilities"]["far"]
    return done.returncode, {f["name"]: f for f in found}


def test_doctor_says_what_a_host_is_good_for(far: Sshd) -> None:
    """Protects who is about to start a site there."""
    code, found = _doctor(far, f"python={sys.executable}")
    assert code == 0, found
    line = found.pop("forwarded port")
    assert {f["status"] for f in found.values()} == {"pass"}
    assert line["status"] in ("pass", "warn")  # as this host is idle or busy
    assert "MB/s from there" in line["observed"]
    code, found = _doctor(far, "python=/no/python")
    assert (code, found["Python there"]["status"]) == (1, "fail")
    assert "ssh=far python=/path" in found["Python there"]["fix"]


def test_doctor_names_what_a_centre_forbids(tmp_path: Path) -> None:
    """Protects from a site that could never reach its server."""
    with sshd(tmp_path / "closed", "AllowTcpForwarding local") as closed:
        code, found = _doctor(closed, f"python={sys.executable}")
    assert (code, found["forwarded port"]["status"]) == (1, "fail")
    assert "AllowTcpForwarding" in found["forwarded port"]["fix"]


def test_a_port_held_by_a_line_that_sleeps_is_had_again(
    far: Sshd, host: SshHost, tmp_path: Path
) -> None:
    """Protects a laptop that slept: the host does not know that the connection is dead, and would
    hold the port for hours; no other connection of the user's is touched."""
    folder, other_folder = str(tmp_path / "ein Ort"), tmp_path / "2"
    other_folder.mkdir()
    keeper = [sys.executable, "-m", "flwr_hpc.join.keeper"]
    port = host.expose(far.port)
    with host.follow([*keeper, "follow", folder, "0"]) as follower:
        follower.wait()
    other = SshHost("far", other_folder, str(far.config))
    other.open(ask=False)
    try:
        with pytest.raises(PortTakenError):
            other.expose(far.port, port)
        assert other.ask([*keeper, "release", folder])["released"]
        until(lambda: not host.is_open(), tmp_path)
        until(lambda: _has(other, far.port, port), tmp_path)
        assert not other.ask([*keeper, "release", folder])["released"]
        with other.follow([*keeper, "follow", folder, "0"]) as follower:
            follower.wait()
        assert not other.ask([*keeper, "release", folder])["released"]
        assert other.is_open()
    finally:
        other.close()
