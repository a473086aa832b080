"""``python -m flwr_hpc.doctor ssh=HOST``: whether a site can be started there from here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flwr_hpc.doctor.findings import Checks, Finding, failed, passed, skipped, warned
from flwr_hpc.errors import UserError
from flwr_hpc.ssh import wire
from flwr_hpc.ssh.host import PortTakenError, SshHost, SshLostError
from flwr_hpc.ssh.python_there import PythonThere, look

KEYS = ("ssh", "python", "ssh_config", "dry_run")
SLOW = 2e6  # bytes/s, below which a model of a billion weights travels for half an hour
REACH, PYTHON = "reach", "Python there"


@dataclass
class There:
    """The host, and what is known of it by now."""

    host: SshHost
    program: str | None
    python: PythonThere | None = None


there: Checks[There] = Checks("by ssh")


def wants_ssh(overrides: Sequence[str]) -> bool:
    """Whether a host is to be looked at, and no facility of this machine."""
    return any(o.startswith("ssh=") for o in overrides)


def examine(overrides: Sequence[str]) -> dict[str, list[Finding]]:
    """Look at the host that ``ssh=`` names."""
    given = dict(o.partition("=")[::2] for o in overrides)
    if unknown := [key for key in given if key not in KEYS]:
        raise UserError(
            f"'{unknown[0]}' says nothing about a host. Type: python -m flwr_hpc.doctor ssh=HOST "
            "[python=/path/there] [ssh_config=FILE]. A facility's own checks run there: "
            "ssh HOST python -m flwr_hpc.doctor +facility=NAME"
        )
    with tempfile.TemporaryDirectory(prefix="flwr-hpc-") as folder:
        host = SshHost(given["ssh"], Path(folder), given.get("ssh_config"))
        if given.get("dry_run") == "true":
            nothing = replace(skipped(host.hint), name=REACH, where=there.where)
            return {host.name: [nothing]}
        try:
            return {host.name: there.run(There(host, given.get("python")))}
        finally:
            host.close()


@there(REACH)
def reach(here: There) -> Finding:
    """Open the control connection; OpenSSH may ask for what it needs."""
    began = time.monotonic()
    try:
        here.host.open(ask=True)
    except SshLostError as exc:
        return failed(str(exc), f"make this work first: ssh {here.host.name}")
    return passed(f"connected in {time.monotonic() - began:.1f} s")


@there(PYTHON, needs=[REACH])
def python(here: There) -> Finding:
    """Ask the Python there what it is."""
    try:
        here.python = look(here.host, here.program)
    except UserError as exc:
        return failed(str(exc), f"python -m flwr_hpc.doctor ssh={here.host.name} python=/path")
    found = here.python
    return passed(f"{found.program}, Python {found.version}, on {found.host}")


@there("flwr-hpc there", needs=[PYTHON])
def package(here: There) -> Finding:
    """Compare its version with ours."""
    assert here.python is not None
    if fault := here.python.fault(here.host.name):
        what, _, fix = fault.partition(". ")
        return failed(what, fix)
    return passed(here.python.flwr_hpc)


@there("forwarded port", needs=[PYTHON])
def forward(here: There) -> Finding:
    """Reach a port of this machine from there, and measure the way."""
    assert here.python is not None
    try:
        found = wire.measure(here.host, here.python.program)
    except PortTakenError as exc:
        fix = (
            "its sshd has to allow AllowTcpForwarding (yes or remote); where a centre does not, "
            "type python -m flwr_hpc.serve at a machine that it reaches, and flwr_hpc.join there"
        )
        return failed(str(exc), fix)
    except (UserError, SshLostError) as exc:
        return failed(str(exc), "processes there have to reach ports of 127.0.0.1")
    speed = (
        f"round trip {found.trip_s * 1000:.1f} ms, {found.to_there / 1e6:.1f} MB/s to there, "
        f"{found.from_there / 1e6:.1f} MB/s from there"
    )
    if min(found.to_there, found.from_there) < SLOW:
        return warned(speed, "send less: exchange.codec=[topk,int2], or more steps per round")
    return passed(speed)
