"""Flower's processes: their commands, and what they need in their environment."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from flwr_hpc.errors import UserError
from flwr_hpc.files import publish
from flwr_hpc.flower.processes import Child
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


@dataclass(frozen=True)
class PublicSocket:
    """Where a SuperLink serves sites of other centres, and how."""

    listen: str  # HOST:PORT
    certificate: Path
    certificate_key: Path
    credentials: Path
    exchange: Path  # The store of payloads
    quota_gb: float  # Of a site in there
    events: Path  # Where transfers and starts of SuperNodes are reported
    welcome: Mapping[str, object]  # What a site is told that asks what it joins

    def gate_options(self) -> list[str]:
        """Return the options of `python -m flwr_hpc.gate`."""
        return [
            f"--public={self.listen}",
            f"--credentials={self.credentials}",
            f"--exchange={self.exchange}",
            f"--quota-gb={self.quota_gb:g}",
            f"--events={self.events}",
            f"--welcome={json.dumps(dict(self.welcome))}",
        ]

    def flower_options(self) -> list[str]:
        """Return the options of SuperLink."""
        return [
            f"--ssl-certfile={self.certificate}",
            f"--ssl-keyfile={self.certificate_key}",
            f"--ssl-ca-certfile={self.certificate}",
            "--enable-supernode-auth",
        ]


def superlink(port: int, shared_host: bool, public: PublicSocket | None = None) -> Child:
    """Return the process of the server's SuperLink, on a reserved port."""

    def command() -> list[str]:
        return [
            *_gated("flower-superlink", shared_host, public.gate_options() if public else ()),
            *(public.flower_options() if public else ["--insecure"]),  # loopback only
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


def joined_supernode(
    site: str,
    address: str,
    certificate: Path,
    private_key: Path,
    reserve: Callable[[], int],
    settings: Path,
    shared_host: bool,
) -> Child:
    """Return the process of a site whose server is elsewhere, and may be away for long."""

    def command() -> list[str]:
        return [
            *_gated("flower-supernode", shared_host),
            f"--root-certificates={certificate}",
            f"--auth-supernode-private-key={private_key}",
            f"--superlink={address}",
            f"--port={reserve()}",
            f"--node-config={to_node_config(settings)}",
        ]

    name = supernode_name(site)
    return Child(name, command, restartable=True, patient=True, helper=SUPEREXEC)


def register_node(public_key: Path, site: str) -> list[str]:
    """Return the command that makes a SuperNode known to SuperLink, by its key."""
    command = ["supernode", "register", str(public_key), "flwr-hpc", f"--name={site}"]
    return [_program("flwr"), *command, "--format=json"]


def unregister_node(node_id: int) -> list[str]:
    """Return the command that makes SuperLink forget a SuperNode."""
    return [_program("flwr"), "supernode", "unregister", str(node_id), "flwr-hpc", "--format=json"]


def supernode_name(facility: str) -> str:
    """Return what a facility's SuperNode and its log are called."""
    return f"supernode-{facility}"


def fork_server(home: Path, folder: Path) -> Child:
    """Return the process that ClientApps are forks of, and let SuperNodes find its program.

    Without it they start on their own. Its socket lies in `folder`, which is this host's: shared
    file systems may have no sockets, and long names.
    """
    path = folder / "socket"
    words = [sys.executable, "-S", "-E", program.__file__, str(path), _program("flwr-clientapp")]
    script = _own_programs(home) / "flwr-clientapp"
    publish(script, f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o700)
    command = [sys.executable, "-m", "flwr_hpc.site.start.fork_server", str(path)]
    return Child("fork-server", lambda: command, needed=False)


def flwr_run(app: Path, run: Path) -> list[str]:
    """Return the command that submits the app to SuperLink."""
    setting = f'run-dir="{quote(str(run))}"'
    return [_program("flwr"), "run", str(app), "flwr-hpc", "-c", setting, "--format=json"]


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes; `home` is their FLWR_HOME.

    They import what this process can (a checkout, a strategy beside it) and find each
    other's programs although the virtual environment may not be activated.
    """
    paths = [Path(p or ".").absolute() for p in sys.path]
    installed = (Path(sys.prefix), Path(sys.base_prefix))
    own = [str(p) for p in paths if not any(p.is_relative_to(i) for i in installed)]
    programs = [_own_programs(home), Path(sys.executable).parent]
    return {
        **FLOWER_ENV,
        "FLWR_HOME": str(home),
        "PATH": os.pathsep.join([*map(str, programs), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(own)),
    }


def _gated(program: str, shared_host: bool, more: Sequence[str] = ()) -> list[str]:
    """Return the start of a command that serves nobody but this user, on a reserved port."""
    options = ["--reserved-port", *["--shared-host"] * shared_host, *more]
    return [sys.executable, "-m", "flwr_hpc.gate", *options, program]


def _program(name: str) -> str:
    """Return a program of this Python environment, activated or not."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise UserError(f"the program '{name}' is not installed. Fix it with: pip install flwr")
    return found


def _own_programs(home: Path) -> Path:
    return home / "bin"
