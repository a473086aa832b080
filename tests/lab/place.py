"""What a host that shares nothing is made of, as pure functions: its files, its first steps."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
TEMPLATES = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
NETWORK = "203.0.113"  # RFC 5737 keeps it for documentation: nothing else is ever there
STRANGER = "stranger"
ON_DISK = ("/tmp", "/var/tmp", "/home")  # a folder of its own on every host; memory for the rest
HIDDEN = (*ON_DISK, "/root", "/run", "/dev/shm", "/mnt")


@dataclass(frozen=True)
class Place:
    """A host among others: where its files lie, who may log in, how it is reached."""

    name: str  # what it calls itself
    folder: Path
    number: int  # its address and its users' ids follow from it
    user: str
    hosts: dict[str, str]  # every host's address by its name

    @property
    def address(self) -> str:
        return address(self.number)

    @property
    def users(self) -> dict[str, int]:
        """Return the ids of those who may log in; no two hosts have one in common."""
        first = 20000 + 10 * self.number
        return {"root": 0, self.user: first, STRANGER: first + 1}

    def outside(self, path: str) -> Path:
        """Return where a file in a folder of `ON_DISK` lies on the machine below."""
        if not path.startswith(tuple(f"{folder}/" for folder in ON_DISK)):
            raise ValueError(f"'{path}' is not in one of {', '.join(ON_DISK)}")
        return self.folder / "files" / path[1:]


def address(number: int) -> str:
    return f"{NETWORK}.{number}"


def place_files(place: Place) -> dict[str, str]:
    """Return the host's files by their path in its folder."""
    values = {"place": place, "users": {u: n for u, n in place.users.items() if n}}
    names = {
        "etc/passwd": "passwd.j2",
        "etc/group": "group.j2",
        "etc/shadow": "shadow.j2",
        "etc/hosts": "host_hosts.j2",
        "host_sshd_config": "host_sshd_config.j2",
    }
    return {path: TEMPLATES.get_template(t).render(**values) for path, t in names.items()}


def place_steps(place: Place) -> list[dict[str, Any]]:
    """Return the steps that cut the host off, and connect it to the wide-area network alone."""
    script = TEMPLATES.get_template("isolate.sh.j2").render(
        place=place,
        on_disk=ON_DISK,
        lab=place.folder.parent,
        seen=seen([HERE.parents[1], sys.prefix, sys.base_prefix], [*HIDDEN, place.folder.parent]),
    )
    network = [
        "link set lo up",
        "tuntap add dev net0 mode tun",
        f"addr add {place.address}/24 dev net0",
        "link set net0 up",
    ]
    return [
        {"run": ["sh", "-eu"], "stdin": script},
        {"run": ["ip", "-batch", "-"], "stdin": "\n".join(network)},
    ]


def sshd(place: Place, *options: str) -> list[dict[str, Any]]:
    """Return the steps to the host's sshd."""
    folder = place.folder
    key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/ssh/host_key"]
    start = {
        "start": "sshd",
        "argv": ["/usr/sbin/sshd", "-D", "-e", "-f", f"{folder}/host_sshd_config", *options],
        "log": f"{folder}/log/sshd.out",
        "ready": {"tcp": [place.address, 22]},
    }
    return [{"run": key}, start]


def place_plan(place: Place, keep: bool) -> dict[str, Any]:
    """Return what process 1 of a host without a cluster has to do."""
    return {
        "hostname": place.name,
        "folder": str(place.folder),
        "control": f"{place.folder}/control",
        "remove": False,  # a mount of its own here: the machine below sweeps it
        "keep": keep,
        "steps": [*place_steps(place), *sshd(place)],
        "reboots": ["sshd"],
    }


def seen(paths: Iterable[Path | str], hidden: Iterable[Path | str]) -> list[str]:
    """Return those of the paths that a host would lose sight of; it may go on reading them."""
    lost = [Path(p) for p in paths if any(Path(p).is_relative_to(h) for h in hidden)]
    return [str(p) for p in dict.fromkeys(lost)]
