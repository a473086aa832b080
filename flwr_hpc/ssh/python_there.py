"""The Python of a host that is reached by SSH: which one it is, and what is installed for it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import flwr_hpc
from flwr_hpc import __version__
from flwr_hpc.errors import UserError
from flwr_hpc.ssh.host import SshHost
from flwr_hpc.ssh.wheel import NAME, build_wheel

DEFAULT = "python3"
OLDEST = (3, 11)
INSTALL_S = 600.0
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

    @property
    def too_old(self) -> bool:
        """Whether nothing of flwr-hpc runs on it."""
        return tuple(map(int, self.version.split(".")[:2])) < OLDEST

    @property
    def lacks_package(self) -> bool:
        """Whether it could have this flwr-hpc and has another or none."""
        return not self.too_old and self.flwr_hpc != __version__

    def fault(self, name: str) -> str:
        """Return why it cannot be used, with the command that mends it; empty if it can."""
        if self.too_old:
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


def install(host: SshHost, there: PythonThere) -> PythonThere:
    """Install the flwr-hpc that runs here for a Python there.

    Of what it needs pip fetches what is not there; torch and what else jobs need it leaves alone.
    """
    wheel = f"{there.home}/flwr-hpc/{NAME}"
    host.put(build_wheel(), wheel)
    pip = [there.program, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    host.run([*pip, wheel], timeout_s=INSTALL_S)
    return look(host, there.program)


def install_command(name: str, program: str) -> str:
    """Return what installs this flwr-hpc there, from where this one came."""
    source = Path(flwr_hpc.__file__).resolve().parents[1]
    checkout = shlex.quote(str(source)) if (source / "pyproject.toml").exists() else "CHECKOUT"
    install = shlex.join([program, "-m", "pip", "install", f"{NAME}[train]"])
    return (
        f"python -m pip wheel --no-deps -w . {checkout} && "
        f"scp {NAME} {name}: && ssh {name} {shlex.quote(install)}"
    )


def _last(text: str) -> str:
    return text.splitlines()[-1].rpartition("failed: ")[2]
