"""The Python of a host that is reached by SSH: which one it is, and what is installed for it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import flwr_hpc
from flwr_hpc import __version__
from flwr_hpc.errors import UserError
from flwr_hpc.ssh.host import SshHost

DEFAULT = "python3"
OLDEST = (3, 11)
LOOK = """
import json, os, socket, sys
found = {"python": ".".join(map(str, sys.version_info[:3])), "program": sys.executable,
         "host": socket.gethostname(), "home": os.path.expanduser("~"), "flwr_hpc": ""}
try:
    import flwr_hpc
    found["flwr_hpc"] = flwr_hpc.__version__
except Exception as exc:
    found["why"] = str(exc)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class PythonThere:
    """What a host's Python says of itself."""

    program: str
    version: str
    host: str  # What the host calls itself: one of several login nodes, perhaps
    home: str
    flwr_hpc: str  # Its version; empty: not installed

    def fault(self, name: str) -> str:
        """Return why it cannot be used, with the command that mends it; empty if it can."""
        if tuple(map(int, self.version.split(".")[:2])) < OLDEST:
            return (
                f"{self.program} on {name} is Python {self.version}, and flwr-hpc needs "
                f"{'.'.join(map(str, OLDEST))} or newer. Name another one there"
            )
        if self.flwr_hpc != __version__:
            what = f"flwr-hpc {self.flwr_hpc}" if self.flwr_hpc else "no flwr-hpc"
            return (
                f"{self.program} on {name} has {what}, and the run needs {__version__}. "
                f"Install it there: {install_command(name, self.program)}"
            )
        return ""


def look(host: SshHost, program: str | None) -> PythonThere:
    """Ask a host's Python what it is; a UserError where there is none of that name."""
    words = [program or DEFAULT, "-c", LOOK]
    try:
        found = host.ask(words)
    except UserError as exc:
        raise UserError(
            f"{words[0]} does not run on {host.name} ({_last(str(exc))}). "
            "Name the Python there that has flwr-hpc, by its whole path"
        ) from None
    keys = ("program", "python", "host", "home", "flwr_hpc")
    return PythonThere(*(str(found.get(key, "")) for key in keys))


def install_command(name: str, program: str) -> str:
    """Return what installs this flwr-hpc there, from where this one came."""
    source = Path(flwr_hpc.__file__).resolve().parents[1]
    checkout = shlex.quote(str(source)) if (source / "pyproject.toml").exists() else "CHECKOUT"
    wheel = f"flwr_hpc-{__version__}-py3-none-any.whl"
    install = shlex.join([program, "-m", "pip", "install", f"{wheel}[train]"])
    return (
        f"python -m pip wheel --no-deps -w . {checkout} && "
        f"scp {wheel} {name}: && ssh {name} {shlex.quote(install)}"
    )


def _last(text: str) -> str:
    return text.splitlines()[-1].rpartition("failed: ")[2]
