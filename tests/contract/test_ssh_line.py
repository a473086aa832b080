"""A line to a site, over a real sshd, that is cut again and again."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from worlds.jobs import command_line, until
from worlds.network.sshd import Sshd, needs_sshd, sshd

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.invitation import Invitation
from flwr_hpc.server import invitations
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.ssh import attendant
from flwr_hpc.ssh.attendant import Attendant
from flwr_hpc.ssh.host import SshHost
from flwr_hpc.ssh.remote_site import RemoteSite

pytestmark = needs_sshd

CUTS = 20
# Writes a line now and then, until it is told to end; `hold` is what the keeper knows it by.
SITE = """
import json, os, pathlib, socket, sys, time
folder = pathlib.Path(sys.argv[2])
held = {"pid": os.getpid(), "host": socket.gethostname()}
n = 0
with open(folder / "site.log", "a") as log:
    (folder / "held.tmp").write_text(json.dumps(held))
    (folder / "held.tmp").replace(folder / "held.json")
    while not (folder / "enough").exists():
        log.write(f"[{n:6.1f} s] line {n}\\n")
        log.flush()
        n += 1
        time.sleep(0.03)
(folder / "ended.tmp").write_text(json.dumps({"code": 0}))
(folder / "ended.tmp").replace(folder / "ended.json")
"""


class _Site(RemoteSite):
    """Starts a process that only writes, in place of `flwr_hpc.join`."""

    processes: list[subprocess.Popen[bytes]]

    def _start(self, invitation: Invitation) -> dict[str, Any]:
        words = [sys.executable, "-c", SITE, "hold", self.known.folder]
        self.processes.append(subprocess.Popen(words))
        folder = Path(self.known.folder)
        until(lambda: (folder / "held.json").exists(), folder)
        return self._keep("look")


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Sshd]:
    with sshd(tmp_path / "ein Übergang") as server:
        yield server


@pytest.fixture
def site(far: Sshd, tmp_path: Path) -> Iterator[_Site]:
    settings = [f"ssh_config={far.config}", f"facilities.local_a.ssh_python={sys.executable}"]
    settings += ["+facility=local_a", "facilities.local_a.ssh=far", f"run_dir={tmp_path}/run"]
    config = compose_config(settings)
    invitations.serve_by_ssh(config)
    run = RunDir.create(config)
    (path,) = invitations.prepare(run, config)
    host = SshHost("far", tmp_path / "c", str(far.config))
    site = _Site("local_a", host, config, path, run.ssh / "local_a.json")
    site.processes = []
    yield site
    host.close()
    for process in site.processes:
        process.kill()


def _master(far: Sshd) -> psutil.Process | None:
    words = ("ssh -F", "-M -N", str(far.config))
    lines = ((p, command_line(p)) for p in psutil.process_iter())
    return next((p for p, line in lines if all(word in line for word in words)), None)


def _open(site: _Site, far: Sshd, but: set[int]) -> psutil.Process | None:
    """Return the connection, once it is open."""
    found = _master(far)
    return found if found and found.pid not in but and site.host.is_open() else None


def test_a_line_cut_twenty_times_loses_and_doubles_nothing(
    site: _Site, far: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a run of days over a bad line: one site, one port, each word of it once."""
    monkeypatch.setattr(attendant, "PAUSES_S", (0.1,))
    monkeypatch.setattr(attendant, "LOOK_S", 0.1)
    draw, log = random.Random(7), tmp_path / "site.log"
    one = Attendant(site, log, "")
    one.start(far.port)
    cut: set[int] = set()
    ports: set[int] = set()
    while (n := len(cut)) < CUTS:
        process = until(lambda: _open(site, far, cut), tmp_path)
        if n % 2 == 0:  # it reads; else it attaches, or begins to follow
            read = site.known.offset
            until(lambda read=read: site.known.offset > read, tmp_path)  # type: ignore[misc]
            ports.add(site.known.port)
        time.sleep(draw.uniform(0.0, 0.4))
        with suppress(psutil.NoSuchProcess):  # it has made way for the one in the background
            process.kill()
            cut.add(process.pid)
    folder = Path(site.known.folder)
    (folder / "enough").touch()
    until(lambda: one.over, tmp_path)
    assert log.read_text() == (folder / "site.log").read_text()
    assert len(site.processes) == 1
    assert ports == {site.known.port}
    assert one.finish(finished=True) == ""
