"""A host that shares nothing: commands on it as its user, its files, its ports, its reboot."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .cluster import Cluster
from .host import ENV, LabError
from .link import Link
from .machine import Machine
from .place import Place

PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(frozen=True, order=True)
class Listener:
    """A socket that takes connections."""

    address: str
    port: int
    program: str


class Process(subprocess.Popen[str]):
    """A command on a host; signals reach it, not the program that took it there."""

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends by itself just now
                for child in psutil.Process(self.pid).children():
                    child.send_signal(sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Host:
    """A host of the lab's wide-area network.

    Parameters
    ----------
    place : Place
    machine : Machine
        Its namespaces.
    cluster : Cluster, optional
        The Slurm cluster whose login node it is; only it reaches that.
    link : Link
        Its line to the others.
    """

    def __init__(self, place: Place, machine: Machine, link: Link) -> None:
        self.name, self.user, self.address = place.name, place.user, place.address
        self.place, self.machine, self.link = place, machine, link
        self.cluster = machine if isinstance(machine, Cluster) else None

    def command(self, *argv: str, user: str = "", env: dict[str, str] | None = None) -> list[str]:
        """Return what to give on the machine below to run a command here, in the user's home."""
        user = user or self.user
        number = self.place.users[user]
        home = f"/home/{user}" if number else "/"
        values = {"HOME": home, "USER": user, "LOGNAME": user, "SHELL": "/bin/bash", "PATH": PATH}
        values |= {"LANG": "C.UTF-8", "TERM": os.environ.get("TERM", "dumb")}
        if self.cluster:
            values["SLURM_CONF"] = str(self.cluster.conf)
        values |= env or {}
        become = ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups", "--"]
        pairs = [f"{name}={value}" for name, value in values.items()]
        return self.machine.inside(*become, "env", "-i", f"--chdir={home}", *pairs, *argv)

    def popen(
        self, *argv: str, user: str = "", env: dict[str, str] | None = None, **options: Any
    ) -> Process:
        """Start a command; `options` are Popen's."""
        return Process(self.command(*argv, user=user, env=env), env=ENV, text=True, **options)

    def run(
        self,
        *argv: str,
        user: str = "",
        env: dict[str, str] | None = None,
        stdin: str = "",
        timeout_s: float = 300,
    ) -> str:
        """Return what a command printed.

        Raises
        ------
        LabError
            With the command's own words when it fails.
        """
        pipe = subprocess.PIPE
        process = self.popen(*argv, user=user, env=env, stdin=pipe, stdout=pipe, stderr=pipe)
        typed = f"{self.name}: {shlex.join(argv)}"
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise LabError(f"{typed}: no end in {timeout_s:.0f} s") from None
        if process.returncode:
            raise LabError(f"{typed}: exit code {process.returncode}: {(err + out).strip()}")
        return out

    def kill_all(self) -> None:
        """Reboot: kill -9 whatever runs here, then start sshd; the cluster's nodes go on."""
        self.machine.ask({"do": "reboot"})

    def listening(self) -> list[Listener]:
        """Return who takes TCP connections here, by ``ss -ltnp``."""
        found = set()
        for line in self.run("ss", "-H", "-ltnp", user="root").splitlines():
            _, _, _, local, _, *users = line.split()
            address, _, port = local.rpartition(":")
            program = users[0].split('"')[1] if users else ""
            found.add(Listener(address.strip("[]"), int(port), program))
        return sorted(found)

    def outside(self, path: str) -> Path:
        """Return where a file in /home, /tmp or /var/tmp lies on the machine below."""
        return self.place.outside(path)

    def write(self, path: str, text: str, user: str = "", mode: int = 0o600) -> None:
        """Write a file in /home, /tmp or /var/tmp, with its folders, as a user of the host."""
        number = self.place.users[user or self.user]
        target = self.outside(path)
        for folder in reversed(target.parents):
            if not folder.exists():
                folder.mkdir(mode=0o700)
                os.chown(folder, number, number)
        target.touch(mode=mode)
        target.chmod(mode)
        target.write_text(text)
        os.chown(target, number, number)

    def copy(self, source: Path, path: str) -> None:
        """Write the files of a folder of the machine below into one of its user's."""
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            target = f"{path}/{file.relative_to(source)}"
            self.write(target, "")
            self.outside(target).write_bytes(file.read_bytes())
