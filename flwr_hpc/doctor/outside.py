"""All that the checks ask of the machine they run on, in one place, so that tests can answer."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str = ""


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of what is installed; imports nothing."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hub_url(env: Mapping[str, str]) -> str:
    """Return where Hugging Face's client downloads from."""
    return env.get("HF_ENDPOINT") or "https://huggingface.co"


def reach(url: str, timeout_s: float = 15.0) -> str:
    """Return why a web server cannot be reached, proxies considered; empty if it can."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s):
            return ""
    except urllib.error.HTTPError:  # it answered
        return ""
    except (OSError, ValueError) as exc:
        return str(exc)


class Outside:
    """The real machine.

    Parameters
    ----------
    env : mapping
        Of the commands.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = dict(env)

    def ask(self, *command: str, timeout_s: float = 60.0) -> Answer:
        """Run a command and return what it said."""
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=timeout_s, check=False, env=self.env,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Answer(124, "", f"no answer in {timeout_s:.0f} s")
        except OSError as exc:
            return Answer(127, "", str(exc))
        return Answer(done.returncode, done.stdout, done.stderr)

    def which(self, program: str) -> str | None:
        """Return the path of a program."""
        return shutil.which(program)

    def free(self, path: Path) -> tuple[int, int]:
        """Return the free bytes and files (-1: without limit) for this user."""
        stat = os.statvfs(path)
        return shutil.disk_usage(path).free, stat.f_favail if stat.f_files else -1

    def mount(self, path: Path) -> tuple[str, str]:
        """Return device and type of the file system a path is on."""
        mounts = {Path(p.mountpoint): p for p in psutil.disk_partitions(all=True)}
        for folder in (path, *path.parents):
            if folder in mounts:
                return mounts[folder].device, mounts[folder].fstype
        return "", ""

    def reach(self, url: str) -> str:
        """Return why a web server cannot be reached; empty if it can."""
        return reach(url)

    def loopback(self) -> str:
        """Return why processes here cannot talk to each other; empty if they can."""
        try:
            with socket.create_server(("127.0.0.1", 0)) as door:
                socket.create_connection(door.getsockname()[:2], timeout=5).close()
        except OSError as exc:
            return str(exc)
        return ""

    def versions(self, packages: Sequence[str]) -> dict[str, str]:
        """Return the versions of what is installed."""
        return versions(packages)
