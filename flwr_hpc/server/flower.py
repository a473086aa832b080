"""Flower's processes: their commands, and what they need in their environment."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from flwr_hpc.errors import UserError
from flwr_hpc.files import publish
from flwr_hpc.server.processes import Child
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.site.settings import to_node_config
from flwr_hpc.site.start import program

START_S = 90.0  # for Flower's processes to come up; twice as long at each further try
SUPEREXEC = "flower-superexec"  # SuperLink and SuperNode start theirs by a bare Popen
FLOWER_ENV = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
    "PYTHONUNBUFFERED": "1",
}


def superlink(port: int, shared_host: bool) -> Child:
    """Return the process of the server's SuperLink, on a reserved port."""

    def command() -> list[str]:
        return [
            *_gated("flower-superlink", shared_host),
            "--insecure",  # loopback only
            "--host=127.0.0.1",
            f"--port={port}",
            "--disable-runtime-dependency-installation",
        ]

    return Child("superlink", command, helper=SUPEREXEC)


def supernode(
    facility: str, superlink: int, reserve: Callable[[], int], site: Path, shared_host: bool
) -> Child:
    """Return the process of a facility's site, started from its site file.

    Each start gets a port of its own: what is left of the one before must not speak to it.
    """

    def command() -> list[str]:
        return [
            *_gated("flower-supernode", shared_host),
            "--insecure",
            f"--superlink=127.0.0.1:{superlink}",
            f"--port={reserve()}",
            f"--node-config={to_node_config(site)}",
        ]

    return Child(supernode_name(facility), command, restartable=True, helper=SUPEREXEC)


def supernode_name(facility: str) -> str:
    """Return what a facility's SuperNode and its log are called."""
    return f"supernode-{facility}"


def fork_server(run: RunDir, folder: Path) -> Child:
    """Return the process that ClientApps are forks of, and let SuperNodes find its program.

    Without it they start on their own. Its socket lies in `folder`, which is this host's: shared
    file systems may have no sockets, and long names.
    """
    path = folder / "socket"
    words = [sys.executable, "-S", "-E", program.__file__, str(path), _program("flwr-clientapp")]
    script = _own_programs(run) / "flwr-clientapp"
    publish(script, f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o700)
    command = [sys.executable, "-m", "flwr_hpc.site.start.fork_server", str(path)]
    return Child("fork-server", lambda: command, needed=False)


def _own_programs(run: RunDir) -> Path:
    return run.flower / "bin"


def wandb_follower(run: RunDir) -> list[str]:
    """Return the command that sends the event log to Weights & Biases."""
    return [sys.executable, "-m", "flwr_hpc.server.wandb_follow", str(run.path)]


def flwr_run(app: Path, run: RunDir) -> list[str]:
    """Return the command that submits the app to SuperLink."""
    setting = f'run-dir="{quote(str(run.path))}"'
    return [_program("flwr"), "run", str(app), "flwr-hpc", "-c", setting, "--format=json"]


def environment(run: RunDir) -> dict[str, str]:
    """Return the environment of Flower's processes.

    They import what this process can (a checkout, a strategy beside it) and find each
    other's programs although the virtual environment may not be activated.
    """
    paths = [Path(p or ".").absolute() for p in sys.path]
    installed = (Path(sys.prefix), Path(sys.base_prefix))
    own = [str(p) for p in paths if not any(p.is_relative_to(i) for i in installed)]
    programs = [_own_programs(run), Path(sys.executable).parent]
    return {
        **FLOWER_ENV,
        "FLWR_HOME": str(run.flower),
        "PATH": os.pathsep.join([*map(str, programs), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(own)),
    }


def _gated(program: str, shared_host: bool) -> list[str]:
    """Return the start of a command that serves nobody but this user, on a reserved port."""
    options = ["--reserved-port", *["--shared-host"] * shared_host]
    return [sys.executable, "-m", "flwr_hpc.gate", *options, program]


def _program(name: str) -> str:
    """Return a program of this Python environment, activated or not."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise UserError(f"the program '{name}' is not installed. Fix it with: pip install flwr")
    return found


def wait_until_up(superlink: Child, port: int, log: Path, start_s: float) -> None:
    """Wait until our SuperLink, and no other process, listens on the port."""
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline and not superlink.dead():
        if port in superlink.listening():
            return
        time.sleep(0.1)
    raise RuntimeError(f"SuperLink did not start:\n{tail(log)}")


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
