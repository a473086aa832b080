"""What can go wrong at a centre, done on purpose to a run on clusters of the lab.

Each fault does its harm and returns what was hit, and how it is repaired, if it does not go away
by itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from lab.cluster import Cluster
from worlds.campaign import FORK_SERVER, Harm, Missed, Scene, by_name, program
from worlds.jobs import command_line
from worlds.runs.run import Run

from flwr_hpc.spool import Spool

LIMITS_S = 35.0  # slurmctld looks at time limits every half minute


class Disk:
    """A small disk in memory, mounted before the clusters that are to see it come up.

    ``sites`` is a mount of its own, so that the login node's view of it can be read-only while the
    jobs write their logs.
    """

    def __init__(self, folder: Path, size_mb: int = 600) -> None:
        self.folder, self.sites = folder, folder / "sites"
        folder.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", f"size={size_mb}m,mode=755", "tmpfs", str(folder))
        self.sites.mkdir()
        _mount("--bind", str(self.sites), str(self.sites))

    def fill(self) -> None:
        """Leave no byte free."""
        free = os.statvfs(self.folder)
        with open(self.folder / "fill", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)

    def empty(self) -> None:
        (self.folder / "fill").unlink(missing_ok=True)

    def write_protect(self, on: bool) -> None:
        """Make the sites' folders read-only for the login node, or writable again."""
        _mount("-o", f"remount,bind,{'ro' if on else 'rw'}", str(self.sites))

    def remove(self) -> None:
        for path in (self.sites, self.folder):
            subprocess.run(["umount", "--lazy", str(path)], check=False)
        self.folder.rmdir()


@dataclass
class SlurmScene(Scene):
    """A run under way, the clusters it runs on by facility, and its disk."""

    run: Run
    clusters: Mapping[str, Cluster]
    disk: Disk
    draw: random.Random

    @property
    def commands(self) -> Mapping[str, subprocess.Popen[Any]]:
        return {"run": self.run.process}

    def again(self, where: str) -> None:
        self.run = Run(self.run.dir, resume=True, output=self.run.output)

    def said(self, where: str) -> str:
        return self.run.said()

    def work(self) -> object:
        done = len(self.run.events("order_done"))
        steps = []
        for facility in self.clusters:
            with suppress(OSError, ValueError):
                orders = self.spool(facility).orders()
                steps += [(o.id, o.progress().get("step"), o.has_result) for o in orders]
        return done, tuple(steps)

    @property
    def key(self) -> str:
        """What the names of the run's jobs begin with."""
        return str(json.loads((self.run.dir / "run.json").read_text())["run_key"])

    def spool(self, facility: str) -> Spool:
        return Spool(self.disk.sites / "flwr-hpc" / self.key / facility)

    def state(self, facility: str) -> str:
        """Return the state of the newest job's worker at a site, empty if there is none."""
        allocations = self.spool(facility).allocations()
        state = allocations[-1].state() if allocations else None
        return state.state if state else ""

    def is_idle(self, facility: str) -> bool:
        """Tell whether a site's job waits for orders."""
        return self.state(facility) == "ready"

    def any_cluster(self) -> Cluster:
        return self.clusters[self.draw.choice(sorted(self.clusters))]

    def job(self, cluster: Cluster) -> str:
        """Return the id of the job that runs on a cluster."""
        return self.one(cluster.slurm("squeue", "-h", "-t", "RUNNING", "-o", "%A").split())

    def session(self, *words: str) -> psutil.Process:
        """Return a process of the driver's whose own or parent's command line has each word."""
        with suppress(psutil.Error):
            family = psutil.Process(self.run.process.pid).children(recursive=True)
            return self.one([p for p in family if self._is(p, words)])
        raise Missed("the command has ended")

    def _is(self, process: psutil.Process, words: tuple[str, ...]) -> bool:
        own, *outer = words
        with suppress(psutil.Error):
            parent = process.parent()
            above = command_line(parent) if parent else ""
            return program(process.cmdline()) == own and all(word in above for word in outer)
        return False

    def in_jobs(self, cluster: Cluster, name: str) -> list[psutil.Process]:
        """Return the processes of a name on a cluster's compute nodes."""
        supervisor = psutil.Process(int((cluster.folder / "supervisor").read_text().split()[0]))
        found = []
        for process in supervisor.children(recursive=True):
            with suppress(psutil.Error):
                if process.name() == name:
                    found.append(process)
        return found

    def rank(self, cluster: Cluster, first: bool) -> psutil.Process:
        """Return rank 0 of a cluster's job, or another one."""
        found = []
        for process in psutil.process_iter(["name", "environ", "cmdline"]):
            env, words = process.info["environ"] or {}, process.info["cmdline"] or []
            here = env.get("SLURM_CONF") == str(cluster.conf) and "SLURM_PROCID" in env
            ours = here and "submitit.core._submit" in words and process.info["name"] != "srun"
            if ours and (env["SLURM_PROCID"] == "0") == first:
                found.append(process)
        return self.one(found)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missed(done.stderr.strip())


# ---- processes of the login node -----------------------------------------------------------------


def driver(scene: SlurmScene) -> Harm:
    scene.run.process.kill()
    scene.run.process.wait()
    return Harm("flwr_hpc.run")


def superlink(scene: SlurmScene) -> Harm:
    return _kill(scene.session("flower-superlink"))


def supernode(scene: SlurmScene) -> Harm:
    return _kill(scene.session("flower-supernode"))


def superexec_of_superlink(scene: SlurmScene) -> Harm:
    return _kill(scene.session("flower-superexec", "flower-superlink"))


def superexec_of_supernode(scene: SlurmScene) -> Harm:
    return _kill(scene.session("flower-superexec", "flower-supernode"))


def server_app(scene: SlurmScene) -> Harm:
    return _kill(scene.session("flwr-serverapp"))


def client_app(scene: SlurmScene) -> Harm:
    return _kill(scene.session(FORK_SERVER, FORK_SERVER))


def program_of_client_app(scene: SlurmScene) -> Harm:
    return _kill(scene.session("flwr-clientapp"))


def fork_server(scene: SlurmScene) -> Harm:
    return _kill(scene.session(FORK_SERVER, "flwr_hpc.run"))


# ---- processes of a job --------------------------------------------------------------------------


def rank_0(scene: SlurmScene) -> Harm:
    return _kill(scene.rank(scene.any_cluster(), first=True))


def other_rank(scene: SlurmScene) -> Harm:
    return _kill(scene.rank(_big(scene), first=False))


def srun(scene: SlurmScene) -> Harm:
    return _kill(scene.one(scene.in_jobs(scene.any_cluster(), "srun")))


def slurmstepd(scene: SlurmScene) -> Harm:
    return _kill(scene.one(scene.in_jobs(scene.any_cluster(), "slurmstepd")))


def rank_pauses(scene: SlurmScene) -> Harm:
    rank = scene.rank(_big(scene), first=scene.draw.random() < 0.5)
    rank.suspend()
    return Harm(_name(rank), lambda: _resume(rank))


def rank_hangs(scene: SlurmScene) -> Harm:
    """Stop a rank that has met the others: for one that starts they wait ten minutes."""
    if scene.state(_big(scene).name) not in ("ready", "running"):
        raise Missed("its ranks have not met yet")
    rank = scene.rank(_big(scene), first=scene.draw.random() < 0.5)
    rank.suspend()
    return Harm(_name(rank))


# ---- Slurm ---------------------------------------------------------------------------------------


def slurmctld(scene: SlurmScene) -> Harm:
    return _daemon(scene.any_cluster(), "slurmctld")


def slurmd(scene: SlurmScene) -> Harm:
    cluster = scene.any_cluster()
    return _daemon(cluster, "slurmd", scene.draw.choice(cluster.nodes))


def slurmdbd(scene: SlurmScene) -> Harm:
    return _daemon(_big(scene), "slurmdbd")


def munge(scene: SlurmScene) -> Harm:
    return _daemon(scene.any_cluster(), "munged")


def node_loses_power(scene: SlurmScene) -> Harm:
    cluster = scene.any_cluster()
    return _daemon(cluster, scene.draw.choice(cluster.nodes))


def node_is_down(scene: SlurmScene) -> Harm:
    return _node(scene, "DOWN")


def node_drains(scene: SlurmScene) -> Harm:
    return _node(scene, "DRAIN")


def partition_is_down(scene: SlurmScene) -> Harm:
    cluster = scene.any_cluster()
    update = ("scontrol", "update", "PartitionName=main")
    cluster.slurm(*update, "State=DOWN")
    return Harm(cluster.name, lambda: cluster.slurm(*update, "State=UP"))


def cancelled(scene: SlurmScene) -> Harm:
    cluster = scene.any_cluster()
    job = scene.job(cluster)
    cluster.slurm("scancel", job)
    return Harm(f"job {job} of {cluster.name}")


def requeued(scene: SlurmScene) -> Harm:
    cluster = scene.any_cluster()
    job = scene.job(cluster)
    cluster.slurm("scontrol", "requeue", job)
    return Harm(f"job {job} of {cluster.name}")


def suspended(scene: SlurmScene) -> Harm:
    cluster = scene.any_cluster()
    job = scene.job(cluster)
    cluster.slurm("scontrol", "suspend", job)
    return Harm(f"job {job} of {cluster.name}", lambda: cluster.slurm("scontrol", "resume", job))


def walltime_is_over(scene: SlurmScene) -> Harm:
    """End a job that waits for orders: one at work would rightly return a part of its order.

    The other site's job is held meanwhile, so that there is nothing to order.
    """
    idle = [name for name in scene.clusters if scene.is_idle(name)]
    facility = scene.one(idle)
    cluster, job = scene.clusters[facility], scene.job(scene.clusters[facility])
    (other,) = (c for name, c in scene.clusters.items() if name != facility)
    held = scene.job(other)
    other.slurm("scontrol", "suspend", held)
    try:
        _limit(cluster, job, minutes=1)
        deadline = time.monotonic() + LIMITS_S
        while cluster.slurm("squeue", "-h", "-j", job, "-t", "RUNNING", "-o", "%A"):
            if not scene.is_idle(facility) or time.monotonic() > deadline:
                _limit(cluster, job, minutes=30)
                raise Missed("it has got an order, or is younger than a minute")
            time.sleep(0.05)
    finally:
        other.slurm("scontrol", "resume", held)
    return Harm(f"job {job} of {cluster.name}")


def _limit(cluster: Cluster, job: str, minutes: int) -> None:
    cluster.slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


# ---- disks ---------------------------------------------------------------------------------------


def full_disk(scene: SlurmScene) -> Harm:
    scene.disk.fill()
    return Harm("run directory and sites", scene.disk.empty)


def read_only_disk(scene: SlurmScene) -> Harm:
    scene.disk.write_protect(True)
    return Harm("the sites' folders", lambda: scene.disk.write_protect(False))


KINDS = by_name(
    driver, superlink, supernode, superexec_of_superlink, superexec_of_supernode, server_app,
    client_app, program_of_client_app, fork_server, rank_0, other_rank, srun, slurmstepd,
    rank_pauses, rank_hangs, slurmctld, slurmd, slurmdbd, munge, node_loses_power,
    node_is_down, node_drains, partition_is_down, cancelled, requeued, suspended,
    walltime_is_over, full_disk, read_only_disk,
)  # fmt: skip


def _kill(process: psutil.Process) -> Harm:
    what = _name(process)
    os.kill(process.pid, signal.SIGKILL)
    return Harm(what)


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        rank = process.environ().get("SLURM_PROCID")
        job = process.environ().get("SLURM_JOB_NAME", "")
        own = program(process.cmdline()) or process.name()
        return f"rank {rank} of {job}" if rank and own.startswith("python") else own
    return "a process that has ended"


def _resume(process: psutil.Process) -> None:
    with suppress(psutil.Error):  # its job has been replaced
        process.resume()


def _big(scene: SlurmScene) -> Cluster:
    """Return the cluster with several ranks and accounting."""
    return max(scene.clusters.values(), key=lambda cluster: cluster.shape.nodes)


def _daemon(cluster: Cluster, name: str, node: str = "") -> Harm:
    cluster.kill(name, node)
    return Harm(f"{name} of {node or cluster.name}", lambda: cluster.start(name, node))


def _node(scene: SlurmScene, state: str) -> Harm:
    cluster = scene.any_cluster()
    node = scene.draw.choice(cluster.nodes)
    update = ("scontrol", "update", f"NodeName={node}")
    cluster.slurm(*update, f"State={state}", "Reason=campaign")
    return Harm(node, lambda: cluster.slurm(*update, "State=RESUME"))
