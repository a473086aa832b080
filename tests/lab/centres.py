"""Centres that share nothing and a server, on a wide-area network: up, found again, down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from .cluster import Cluster, write
from .host import HOME, LabError, alive, missing
from .link import Link
from .machine import Machine, boot, launch, new_folder, remove, unshare
from .place import ON_DISK, TEMPLATES, Place, address, place_files, place_plan
from .plan import Shape
from .remote import Host


@dataclass(frozen=True)
class Site:
    """What is asked of a host."""

    name: str
    user: str
    slurm: Shape | None = None  # None: no batch system but the local executor
    opened: tuple[int, ...] | None = (22,)  # the ports that its firewall opens; None: all
    disk_mb: int | None = None  # the size of its disk, in memory; None: that of the machine below


SERVER = Site("server", "sam", opened=None)
CENTRES = (
    SERVER,
    Site("centre_a", "ada", Shape(nodes=1, accounting=False)),
    Site("centre_b", "bob"),
)


class Centres:
    """Hosts by their names; `Centres.up` makes them, `Centres.named` finds them.

    As a context manager they are taken down at the end. They die with the process that made
    them, unless made with ``keep``. The first host's user may log in to every other by SSH.
    """

    def __init__(self, name: str, hosts: dict[str, Host], wan: object = None) -> None:
        self.name, self.hosts, self._wan = name, hosts, wan

    @classmethod
    def up(
        cls, name: str, sites: Sequence[Site] = CENTRES, keep: bool = False, seed: int = 1
    ) -> Centres:
        """Bring hosts up; the links between them are perfect until they are set.

        Parameters
        ----------
        name : str
        sites : sequence of Site
        keep : bool
            Whether they outlive this process.
        seed : int
            Of the draws which packets are lost.

        Raises
        ------
        LabError
            If a step fails, with the end of the log.
        """
        if reason := missing() or missing_tun():
            raise LabError(reason)
        hosts: dict[str, Host] = {}
        try:
            with new_folder(name, "lab") as folder:
                for place, site in zip(places(name, sites), sites, strict=True):
                    link = Link(folder / "control", site.name)
                    hosts[site.name] = Host(place, _machine(place, site, keep), link)
                (folder / "sites.json").write_text(json.dumps([asdict(site) for site in sites]))
                opened = {site.name: site.opened for site in sites}
                wan = _connect(folder, hosts, opened, keep, seed)
                for host in hosts.values():
                    describe(host)
                first, *others = hosts.values()
                for other in others:
                    let_in(first, other)
                return cls(name, hosts, wan)
        except BaseException:
            for host in hosts.values():
                host.machine.down()
            raise

    @classmethod
    def named(cls, name: str) -> Centres:
        """Return hosts that are up."""
        if not alive(HOME / name) or not (HOME / name / "sites.json").exists():
            known = [p.parent.name for p in sorted(HOME.glob("*/sites.json"))]
            raise LabError(f"there are no hosts '{name}'. Up: {', '.join(known) or 'none'}")
        raw = json.loads((HOME / name / "sites.json").read_text())
        sites = [Site(**s | {"slurm": s["slurm"] and Shape(**s["slurm"])}) for s in raw]
        hosts = {}
        for place, site in zip(places(name, sites), sites, strict=True):
            folder = place.folder
            machine = Cluster.named(folder.name) if site.slurm else Machine(folder.name, folder)
            hosts[site.name] = Host(place, machine, Link(HOME / name / "control", site.name))
        return cls(name, hosts)

    def __getitem__(self, name: str) -> Host:
        try:
            return self.hosts[name]
        except KeyError:
            raise LabError(f"no host '{name}'. There are: {', '.join(self.hosts)}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()

    def down(self) -> None:
        """End every process of every host and remove all files."""
        remove(HOME / self.name)
        for host in self.hosts.values():
            host.machine.down()


def missing_tun() -> str:
    """Return why hosts cannot be connected here; empty if they can."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as exc:
        return (
            f"the wide-area network needs /dev/net/tun ({exc.strerror}). Run: modprobe tun; "
            "in a container, start it with: docker run --privileged --device=/dev/net/tun"
        )
    return ""


def places(name: str, sites: Sequence[Site]) -> list[Place]:
    """Return where each host is."""
    hosts = {site.name: address(number) for number, site in enumerate(sites, 1)}
    return [
        Place(site.name, HOME / f"{name}_{site.name}", number, site.user, hosts)
        for number, site in enumerate(sites, 1)
    ]


def let_in(visitor: Host, host: Host) -> None:
    """Let one host's user log in to another by its name, with a key, as to a centre."""
    home, there = f"/home/{visitor.user}/.ssh", f"/home/{host.user}/.ssh"
    key = visitor.outside(f"{home}/id_ed25519")
    if not key.exists():
        visitor.write(f"{home}/config", "")
        visitor.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{home}/id_ed25519")
    host.write(f"{there}/authorized_keys", key.with_suffix(".pub").read_text())
    identity = (host.place.folder / "ssh" / "host_key.pub").read_text()
    known = visitor.outside(f"{home}/known_hosts")
    before = known.read_text() if known.exists() else ""
    visitor.write(f"{home}/known_hosts", f"{before}{host.name},{host.address} {identity}")
    config = visitor.outside(f"{home}/config").read_text()
    visitor.write(f"{home}/config", f"{config}Host {host.name}\n  User {host.user}\n")


def describe(host: Host) -> None:
    """Write the facility's file, for ``--config-dir conf`` in its user's home."""
    if host.cluster:
        text = host.cluster.layout.render("facility.yaml.j2", host.name)
    else:
        text = TEMPLATES.get_template("facility_local.yaml.j2").render(name=host.name)
    host.write(f"/home/{host.user}/conf/facility/{host.name}.yaml", text)


def _machine(place: Place, site: Site, keep: bool) -> Machine:
    with new_folder(place.folder.name, "host", site.disk_mb) as folder:
        for path in ON_DISK:
            (folder / "files" / path[1:]).mkdir(parents=True)
            (folder / "files" / path[1:]).chmod(0o755 if path == "/home" else 0o1777)
        for user, number in place.users.items():
            if number:
                home = place.outside(f"/home/{user}")
                home.mkdir(mode=0o700)
                os.chown(home, number, number)
        if site.slurm:
            shape = replace(site.slurm, user=site.user)
            return Cluster.at(folder, shape, keep, place)
        (folder / "ssh").mkdir()
        write(folder, place_files(place))
        process, _ = unshare(folder)
        return Machine(folder.name, folder, boot(process, place_plan(place, keep), folder))


def _connect(
    folder: Path, hosts: dict[str, Host], opened: dict[str, Any], keep: bool, seed: int
) -> subprocess.Popen[str]:
    """Start the wide-area network; returns its process, whose input is its lifeline."""
    wan = [sys.executable, "-I", "-S", str(Path(__file__).with_name("wan.py"))]
    connected = {
        name: {"pid": host.machine.pid_1(), "address": host.address, "open": opened[name]}
        for name, host in hosts.items()
    }
    process = launch(folder, [*wan, f"{folder}/control"], "wan.log")
    boot(process, {"keep": keep, "seed": seed, "hosts": connected}, folder)
    return process
