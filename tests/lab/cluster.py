"""One real Slurm cluster: up, used, broken on purpose, down."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO

from .host import HOME, LabError, alive, as_user, connect, missing, route, run
from .machine import PATIENCE_S, Machine, boot, new_folder, unshare
from .plan import Layout, Place, Shape, files, login_plan

PARTS = ("munge", "run", "state", "spool", "ssh", "dev", "db")


class Cluster(Machine):
    """A cluster by its name; `Cluster.up` makes one, `Cluster.named` finds one."""

    log = "slurmctld.log"

    def __init__(self, layout: Layout, lifeline: IO[str] | None = None) -> None:
        super().__init__(layout.name, layout.folder, lifeline)
        self.layout, self.shape = layout, layout.shape
        self.nodes = [node["name"] for node in layout.nodes]
        self.conf = self.folder / "slurm.conf"

    @classmethod
    def up(cls, name: str, shape: Shape | None = None, keep: bool = False) -> Cluster:
        """Bring a cluster up; all of its nodes are idle on return.

        Raises
        ------
        LabError
            If a step fails, with the end of the daemon's log.
        """
        if reason := missing():
            raise LabError(reason)
        with new_folder(name, "cluster") as folder:
            return cls.at(folder, shape or Shape(), keep)

    @classmethod
    def at(cls, folder: Path, shape: Shape, keep: bool, place: Place | None = None) -> Cluster:
        """Bring a cluster up in an empty folder; its login node is the host at `place`, if any."""
        for part in PARTS:
            (folder / part).mkdir()
            (folder / part).chmod(0o755)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        process, pid = unshare(folder)
        layout = Layout(folder.name, folder, connect(pid), shape, place)
        route(layout.index, layout.outside, layout.login)
        write(folder, files(layout))
        (folder / "layout.json").write_text(
            json.dumps({"index": layout.index, "shape": asdict(shape)})
        )
        cluster = cls(layout, boot(process, login_plan(layout, keep), folder))
        cluster.until(cluster.idle, PATIENCE_S, "nodes that are idle")
        return cluster

    @classmethod
    def named(cls, name: str) -> Cluster:
        """Return a cluster that is up."""
        folder = HOME / name
        if not alive(folder):
            known = [p.name for p in sorted(HOME.glob("*")) if alive(p)]
            raise LabError(f"there is no cluster '{name}'. Up: {', '.join(known) or 'none'}")
        raw = json.loads((folder / "layout.json").read_text())
        return cls(Layout(name, folder, raw["index"], Shape(**raw["shape"])))

    def down(self) -> None:
        super().down()
        link = Path(f"/sys/class/net/lab{self.layout.index}")
        with contextlib.suppress(LabError):  # the kernel takes its time
            self.until(lambda: not link.exists(), 10, "the end of its network")

    def slurm(self, *argv: str, user: str = "root") -> str:
        """Return what a Slurm command prints on the host, as on a login node."""
        return run(*as_user(user), "env", f"SLURM_CONF={self.conf}", *argv)

    def inside(self, *argv: str, node: str = "") -> list[str]:
        return super().inside("env", f"SLURM_CONF={self.conf}", *argv, node=node)

    def idle(self) -> bool:
        """Tell whether every node waits for work."""
        try:
            states = self.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
        except LabError:  # slurmctld is not there yet
            return False
        return states == ["idle"] * self.shape.nodes

    def occupy(
        self,
        seconds: float,
        nodes: int | None = None,
        partition: str = "main",
        name: str = "other",
    ) -> str:
        """Submit another user's job that holds whole nodes (default: all); returns its id."""
        job = ["sbatch", "--parsable", f"--job-name={name}", f"--partition={partition}"]
        job += [f"--nodes={nodes or self.shape.nodes}", "--exclusive", "--chdir=/"]
        job += ["--output=/dev/null", "--wrap", f"exec sleep {seconds:g}"]
        return self.slurm(*job, user="nobody").strip()

    def active_jobs(self) -> list[str]:
        """Return the ids of jobs that wait, run or end."""
        return self.slurm("squeue", "-h", "-a", "-o", "%A").split()

    def reset(self) -> None:
        """Bring the cluster back to how it was made; only the accounting keeps its past.

        Raises
        ------
        LabError
            If that does not work: better take it down then.
        """
        daemons = ["munged", *(["mariadbd", "slurmdbd"] if self.shape.accounting else [])]
        for daemon in [*daemons, "slurmctld", *self.nodes]:
            self.start(daemon)
        for node in self.nodes:
            self.start("slurmd", node)
        if jobs := self.active_jobs():
            with contextlib.suppress(LabError):  # some end by themselves just now
                self.slurm("scancel", "--signal=KILL", "--full", *jobs)  # who ignores SIGTERM
            with contextlib.suppress(LabError):
                self.slurm("scancel", *jobs)
        for partition in ("main", "short", "scavenge", "urgent"):
            self.slurm("scontrol", "update", f"PartitionName={partition}", "State=UP")
        grace = f"GraceTime={self.shape.grace_s}"
        self.slurm("scontrol", "update", "PartitionName=scavenge", grace)
        for node in self.nodes:
            with contextlib.suppress(LabError):  # it is not down
                self.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.until(lambda: not self.active_jobs() and self.idle(), PATIENCE_S, "an empty cluster")


def write(folder: Path, contents: dict[str, str]) -> None:
    """Write files, for everybody to read but those that hold a secret."""
    for path, text in contents.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.parent.chmod(0o755)
        target.write_text(text)
        target.chmod(0o600 if path in ("slurmdbd.conf", "etc/shadow") else 0o644)
