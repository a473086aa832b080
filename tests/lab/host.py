"""What a cluster needs of the host: programs, rights, a network of its own, a clean slate."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

__all__ = [
    "ENV",
    "HOME",
    "LabError",
    "alive",
    "as_user",
    "clear",
    "connect",
    "missing",
    "python",
    "route",
    "run",
    "sweep",
]

HOME = Path(os.environ.get("FLWR_HPC_LAB", "/var/lib/flwr-hpc-lab"))
NETWORKS = 512
CLOCK_S = 60.0  # by so much may a host's clock have been set
YOUNG_S = 3600.0  # by then a folder has a supervisor: hosts come up one after the other
PACKAGES = {  # a program of each
    "slurm-wlm": "slurmctld",
    "slurmdbd": "slurmdbd",
    "munge": "munged",
    "mariadb-server": "mariadbd",
    "openssh-server": "sshd",
    "iproute2": "ip",
    "util-linux": "unshare",
}
# Daemons are not in every user's PATH.
ENV = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
INSTALL = "apt-get install -y --no-install-recommends"


class LabError(Exception):
    """The lab cannot do what was asked; the message says why and what to do."""


@functools.cache
def missing(command: str = "") -> str:
    """Return why no cluster can be brought up here, with the fix; empty if one can.

    `command` is what should be run as root then; default: the tests.
    """
    absent = [p for p, program in PACKAGES.items() if not shutil.which(program, path=ENV["PATH"])]
    if absent:
        return f"packages are missing. Run: sudo {INSTALL} {' '.join(absent)}"
    if os.geteuid() != 0:
        command = command or f"{python()} -m pytest -m slurm"
        return f"a Slurm cluster needs root. Run: sudo -E {command}"
    trial = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "--net"]
    trial += as_user("nobody")
    done = subprocess.run([*trial, "true"], capture_output=True, text=True, env=ENV, check=False)
    if done.returncode:
        return (
            f"namespaces, or other users' jobs, are not allowed here ({done.stderr.strip()}). "
            "In a container, start it with: docker run --privileged"
        )
    return ""


def python() -> str:
    """Return this interpreter as one would type it here."""
    short = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if short.startswith("..") else short)


def as_user(name: str) -> list[str]:
    """Return what to put before a command so that another Unix user gives it."""
    if name == "root":
        return []
    return ["setpriv", f"--reuid={name}", "--regid=nogroup", "--clear-groups", "--"]


def run(*argv: str, timeout_s: float = 300, stdin: str | None = None) -> str:
    """Return what a command printed.

    Raises
    ------
    LabError
        With the command's own words when it fails.
    """
    try:
        done = subprocess.run(
            argv, env=ENV, input=stdin or "", capture_output=True, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(argv)}: no end in {timeout_s:.0f} s") from None
    if done.returncode:
        said = (done.stderr + done.stdout).strip()
        raise LabError(f"{' '.join(argv)}: exit code {done.returncode}: {said}")
    return done.stdout


def connect(pid: int) -> int:
    """Give a login node's process 1 a link to the host; returns the network's number.

    The link's name is the claim: the kernel gives it once, and takes it back, with address and
    routes, when the login node's last process has gone.
    """
    for index in range(NETWORKS):
        try:
            run(
                "ip", "link", "add", f"lab{index}", "type", "veth", "peer", "wan", "netns", str(pid)
            )
        except LabError as exc:
            if "File exists" in str(exc):
                continue
            raise
        return index
    raise LabError(f"all of {NETWORKS} networks are in use: see `ip link`")


def route(index: int, outside: str, login: str) -> None:
    """Make the host see the login node, and nothing behind it."""
    network = re.sub(r"\.\d+$", ".0/24", login)
    link = f"lab{index}"
    commands = [
        f"addr add {outside} peer {login} dev {link}",
        f"link set {link} up",
        # Or packets for its nodes would leave by the default route; nobody answers for them here.
        f"route add {network} dev {link}",
    ]
    run("ip", "-batch", "-", stdin="\n".join(commands))


def alive(folder: Path) -> bool:
    """Tell whether a cluster's supervisor lives."""
    try:
        pid, began = (folder / "supervisor").read_text().split()
        process = psutil.Process(int(pid))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # psutil adds the host's start by its clock, which may have been set since.
        return abs(process.create_time() - float(began)) < CLOCK_S
    except (OSError, ValueError, psutil.Error):
        return False


def clear(folder: Path) -> None:
    """Remove a folder, and the disk that is mounted there."""
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Remove the folders of clusters that were killed."""
    for folder in HOME.glob("*"):
        if folder.name == "conf":
            continue
        try:
            young = time.time() - folder.stat().st_mtime < YOUNG_S
        except OSError:
            continue
        if not alive(folder) and ((folder / "supervisor").exists() or not young):
            clear(folder)
    with contextlib.suppress(OSError):  # another lab is there, or has just removed it
        HOME.rmdir()
