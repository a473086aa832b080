"""What can go wrong between centres and at their hosts, done on purpose to a run across them.

Each fault does its harm and returns what was hit, and how it is repaired, if it does not go away
by itself.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lab.host import LabError
from lab.remote import Host
from worlds.campaign import FORK_SERVER, Harm, Scene, by_name, program
from worlds.hosts.disk import SmallDisk
from worlds.runs.joined import Joined

from flwr_hpc.spool import Spool

LINE = {"rate_mbit": 20.0, "rtt_ms": 80.0, "loss": 0.01}
BAD_LINE = LINE | {"loss": 0.05}
OUTAGE_S, BAD_S, FULL_S = (3.0, 60.0), (10.0, 60.0), (3.0, 20.0)
FLAPS, FLAP_S, BETWEEN_S = 5, 2.0, 0.5
RANK = "submitit.core._submit"
CONTROLLER = "flwr_hpc.schedulers.local.controller"


@dataclass(frozen=True)
class Process:
    """A process on a host, as the host numbers it."""

    host: Host
    pid: int
    parent: int
    words: tuple[str, ...]

    def kill(self) -> None:
        self.host.run("kill", "-9", str(self.pid), user="root")


def processes(host: Host) -> list[Process]:
    """Return the processes of a host's user that have not ended."""
    shown = [f"-o{column}=" for column in ("uid", "pid", "ppid", "stat", "args")]
    rows = (line.split() for line in host.run("ps", "-e", *shown, user="root").splitlines())
    return [
        Process(host, int(pid), int(parent), tuple(words))
        for uid, pid, parent, state, *words in rows
        if int(uid) == host.place.users[host.user] and not state.startswith("Z")
    ]


@dataclass
class AcrossScene(Scene):
    """A run under way: `serve` at a host, `join` at the others."""

    joined: Joined
    draw: random.Random

    @property
    def commands(self) -> Mapping[str, subprocess.Popen[Any]]:
        return self.joined.commands  # the server's was typed first, and keeps its place

    def again(self, where: str) -> None:
        joined = self.joined
        if where == joined.server.name:
            joined.resume()
        for site in joined.sites:
            # One that thought the run over is needed again, too.
            if site.name == where or (
                where == joined.server.name and self.commands[site.name].poll() == 0
            ):
                joined.join(site)

    def said(self, where: str) -> str:
        return (self.joined.logs / f"{where}.out").read_text(errors="replace")

    def work(self) -> object:
        done = len(self.joined.events("order_done"))
        steps = []
        for site in self.joined.sites:
            with suppress(OSError, ValueError):
                orders = self.spool(site).orders()
                steps += [(o.id, o.progress().get("step"), o.has_result) for o in orders]
        return done, tuple(steps)

    def spool(self, site: Host) -> Spool:
        return Spool(site.outside(f"{self.joined.home(site)}/facilities/{site.name}"))

    def any_site(self) -> Host:
        return self.draw.choice(self.joined.sites)

    def process(self, host: Host, own: str, above: str = "") -> Process:
        """Return a process of a program, or of a Python module, on a host.

        `above`: what its parent's command has to hold.
        """
        found = processes(host)
        parents = {p.pid: " ".join(p.words) for p in found}
        return self.one(
            [
                p
                for p in found
                if (program(p.words) == own or own in p.words)
                and above in parents.get(p.parent, "")
            ]
        )

    def line(self, host: Host) -> str:
        """Describe a host's line: what is on it."""
        joined = self.joined
        sites = [host] if host in joined.sites else joined.sites
        shares = [("fetched", joined.fetched), ("sent", joined.sent)]
        moving = [
            f"{share:.0%} {way}"
            for site in sites
            for way, of in shares
            if 0 < (share := of(site)) < 1
        ]
        return f"line of {host.name}" + (f", {' and '.join(moving)}" if moving else "")


# ---- lines ---------------------------------------------------------------------------------------


def line_is_down(scene: AcrossScene) -> Harm:
    site = scene.any_site()
    return _cut(scene, site, site.link.down)


def site_hears_nothing(scene: AcrossScene) -> Harm:
    site = scene.any_site()
    return _cut(scene, site, lambda: site.link.half_open("in"))


def site_is_not_heard(scene: AcrossScene) -> Harm:
    site = scene.any_site()
    return _cut(scene, site, lambda: site.link.half_open("out"))


def line_flaps(scene: AcrossScene) -> Harm:
    site = scene.any_site()
    what = scene.line(site)
    for _ in range(FLAPS):
        site.link.down()
        time.sleep(FLAP_S)
        site.link.up()
        time.sleep(BETWEEN_S)
    return Harm(what)


def line_is_bad(scene: AcrossScene) -> Harm:
    site = scene.any_site()
    what = scene.line(site)
    site.link.set(**BAD_LINE)
    return Harm(what, lambda: site.link.set(**LINE), BAD_S)


def line_of_server_is_down(scene: AcrossScene) -> Harm:
    server = scene.joined.server
    return _cut(scene, server, server.link.down)


def server_hears_nothing(scene: AcrossScene) -> Harm:
    server = scene.joined.server
    return _cut(scene, server, lambda: server.link.half_open("in"))


def server_is_not_heard(scene: AcrossScene) -> Harm:
    server = scene.joined.server
    return _cut(scene, server, lambda: server.link.half_open("out"))


def _cut(scene: AcrossScene, host: Host, how: Callable[[], None]) -> Harm:
    what = scene.line(host)
    how()
    return Harm(what, host.link.up, OUTAGE_S)


# ---- hosts ---------------------------------------------------------------------------------------


def server_reboots(scene: AcrossScene) -> Harm:
    scene.joined.server.kill_all()
    return Harm(scene.joined.server.name)


def site_reboots(scene: AcrossScene) -> Harm:
    site = scene.any_site()
    site.kill_all()
    return Harm(site.name)


def disk_of_server_is_full(scene: AcrossScene) -> Harm:
    return _fill(scene.joined.server)


def disk_of_site_is_full(scene: AcrossScene) -> Harm:
    return _fill(scene.any_site())


def disk(host: Host) -> SmallDisk:
    return SmallDisk(host.place.folder)


def _fill(host: Host) -> Harm:
    disk(host).fill()
    return Harm(f"disk of {host.name}", lambda: _empty(host), FULL_S)


def _empty(host: Host) -> None:
    """Make room, and resume the nodes that Slurm has drained for want of it."""
    disk(host).empty()
    if cluster := host.cluster:
        for node in cluster.nodes:
            with suppress(LabError):  # it is well
                cluster.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")


# ---- processes -----------------------------------------------------------------------------------


def serve(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.joined.server, "flwr_hpc.serve"))


def superlink(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.joined.server, "flower-superlink"))


def superexec_of_superlink(scene: AcrossScene) -> Harm:
    server = scene.joined.server
    return _kill(scene.process(server, "flower-superexec", "flower-superlink"))


def server_app(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.joined.server, "flwr-serverapp"))


def join(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.any_site(), "flwr_hpc.join"))


def supernode(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.any_site(), "flower-supernode"))


def superexec_of_supernode(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.any_site(), "flower-superexec", "flower-supernode"))


def client_app(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.any_site(), FORK_SERVER, FORK_SERVER))


def program_of_client_app(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.any_site(), "flwr-clientapp"))


def fork_server(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.any_site(), FORK_SERVER, "flwr_hpc.join"))


def rank(scene: AcrossScene) -> Harm:
    return _kill(scene.process(scene.any_site(), RANK))


def controller_of_ranks(scene: AcrossScene) -> Harm:
    own = [site for site in scene.joined.sites if not site.cluster]
    return _kill(scene.process(scene.one(own), CONTROLLER))


def _kill(process: Process) -> Harm:
    process.kill()
    name = program(process.words) or next(w for w in process.words if "." in w and "/" not in w)
    return Harm(f"{name} at {process.host.name}")


KINDS = by_name(
    line_is_down, site_hears_nothing, site_is_not_heard, line_flaps, line_is_bad,
    line_of_server_is_down, server_hears_nothing, server_is_not_heard, server_reboots,
    site_reboots, disk_of_server_is_full, disk_of_site_is_full, serve, superlink,
    superexec_of_superlink, server_app, join, supernode, superexec_of_supernode, client_app,
    program_of_client_app, fork_server, rank, controller_of_ranks,
)  # fmt: skip
