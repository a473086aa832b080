"""One real Slurm cluster: up, used, broken on purpose, down."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import psutil

from .host import ENV, HOME, LabError, alive, as_user, connect, missing, route, run, sweep
from .plan import HERE, Layout, Shape, files, login_plan

PATIENCE_S = 300.0  # of a busy machine
SPACES = ["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--net"]


class Cluster:
    """A cluster by its name; `Cluster.up` makes one, `Cluster.named` finds one.

    As a context manager it is taken down at the end. It dies with the process that made it,
    unless made with ``keep``.
    """

    def __init__(self, layout: Layout, lifeline: IO[str] | None = None) -> None:
        self.layout, self._lifeline = layout, lifeline
        self.name, self.folder, self.shape = layout.name, layout.folder, layout.shape
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
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,19}", name):
            raise LabError(f"a cluster's name is up to 20 of a-z, 0-9 and _, not '{name}'")
        sweep()
        folder = HOME / name
        HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            raise LabError(f"there is a cluster '{name}'; remove it with: down {name}") from None
        try:
            return cls._boot(name, folder, shape or Shape(), keep)
        except BaseException:
            _remove(folder)
            raise

    @classmethod
    def _boot(cls, name: str, folder: Path, shape: Shape, keep: bool) -> Cluster:
        parts = ("munge", "run", "log", "state", "spool", "ssh", "dev", "db")
        for part in parts:
            (folder / part).mkdir()
        for public in (HOME, folder, *(folder / part for part in parts)):
            public.chmod(0o755)  # for other users' jobs, whatever the umask
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        process = _unshare(folder)
        assert process.stdin is not None
        assert process.stdout is not None
        layout = Layout(name, folder, connect(_pid_1(process)), shape)
        route(layout.index, layout.outside, layout.login)
        for path, text in files(layout).items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.parent.chmod(0o755)
            target.write_text(text)
            target.chmod(0o600 if path == "slurmdbd.conf" else 0o644)
        (folder / "layout.json").write_text(
            json.dumps({"index": layout.index, "shape": asdict(shape)})
        )
        process.stdin.write(json.dumps(login_plan(layout, keep)) + "\n")
        process.stdin.flush()
        said = json.loads(_line(process) or "{}")
        if "up" not in said:
            words = said.get("error") or (folder / "log" / "init.log").read_text()[-2000:]
            raise LabError(f"cluster '{name}' does not come up: {words}")
        cluster = cls(layout, process.stdin)
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

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()

    def down(self) -> None:
        """End every process of the cluster and remove its files."""
        if self._lifeline is not None:
            with contextlib.suppress(OSError):
                self._lifeline.close()
        _remove(self.folder)
        link = Path(f"/sys/class/net/lab{self.layout.index}")
        with contextlib.suppress(LabError):  # the kernel takes its time
            self.until(lambda: not link.exists(), 10, "the end of its network")

    def slurm(self, *argv: str, user: str = "root") -> str:
        """Return what a Slurm command prints on the host, as on a login node."""
        return run(*as_user(user), "env", f"SLURM_CONF={self.conf}", *argv)

    def inside(self, *argv: str, node: str = "") -> list[str]:
        """Return the command that runs another one on the login node or a compute node."""
        pid = self._pid_1(node)
        spaces = ["nsenter", f"--target={pid}", "--pid", "--mount", "--uts", "--net", "--"]
        return [*spaces, "env", f"SLURM_CONF={self.conf}", *argv]

    def start(self, daemon: str, node: str = "") -> None:
        """Start a daemon of the login node (``slurmctld``, ``slurmdbd``), ``slurmd``, or a node."""
        self._ask({"do": "start", "name": daemon}, node)

    def kill(self, daemon: str, node: str = "", number: int = 9) -> None:
        """Kill a daemon; a node's name means all that runs on it, as by a power cut."""
        self._ask({"do": "kill", "name": daemon, "signal": number}, node)

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
        self.until(lambda: not self.active_jobs() and self.idle(), 120, "an empty cluster")

    def until(self, what: Callable[[], Any], timeout_s: float, name: str) -> None:
        """Poll until something is true."""
        deadline = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > deadline:
                log = self.folder / "log" / "slurmctld.log"
                tail = log.read_text().splitlines()[-12:] if log.exists() else []
                lines = "\n".join(tail)
                raise LabError(f"'{self.name}': no {name} in {timeout_s:.0f} s; {log}:\n{lines}")
            time.sleep(0.05)

    def _ask(self, request: dict[str, Any], node: str) -> None:
        path = self.folder / (f"{node}.control" if node else "control")
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(PATIENCE_S)
                line.connect(str(path))
                line.sendall(json.dumps(request).encode() + b"\n")
                reply = json.loads(line.makefile().readline() or "{}")
        except OSError as exc:
            raise LabError(f"'{self.name}': {node or 'the login node'} is down: {exc}") from None
        if "error" in reply:
            raise LabError(f"'{self.name}': {reply['error']}")

    def _pid_1(self, node: str) -> int:
        (login,) = _supervisor(self.folder).children()
        if not node:
            return int(login.pid)
        for process in login.children(recursive=True):
            if process.cmdline()[-1:] == [f"{self.folder}/{node}.json"] and _is_python(process):
                return int(process.pid)
        raise LabError(f"node '{node}' of '{self.name}' is down")


def _unshare(folder: Path) -> subprocess.Popen[str]:
    init = [sys.executable, "-I", "-S", str(HERE / "init.py"), "-"]
    with open(folder / "log" / "init.log", "w") as log:
        process = subprocess.Popen(
            ["unshare", *SPACES, *init],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd="/",
            env=ENV,
            umask=0o022,
            start_new_session=True,
        )
    began = psutil.Process(process.pid).create_time()
    draft = folder / "supervisor.tmp"
    draft.write_text(f"{process.pid} {began}")
    draft.replace(folder / "supervisor")
    return process


def _pid_1(supervisor: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and supervisor.poll() is None:
        if children := psutil.Process(supervisor.pid).children():
            return int(children[0].pid)
        time.sleep(0.01)
    raise LabError(f"unshare {' '.join(SPACES)}: no process came of it")


def _line(process: subprocess.Popen[str]) -> str:
    """Return what the login node says; its steps have time-outs of their own."""
    assert process.stdout is not None
    return process.stdout.readline()


def _supervisor(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "supervisor").read_text().split()[0]))


def _is_python(process: psutil.Process) -> bool:
    return bool(process.cmdline()[0] == sys.executable)


def _remove(folder: Path) -> None:
    """End a cluster in good order if it lets us, else by force."""
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        if alive(folder):
            process = _supervisor(folder)
            family = process.children()
            for child in family:
                child.terminate()
            _, left = psutil.wait_procs([*family, process], timeout=5)
            for other in left:
                other.kill()
            psutil.wait_procs(left, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        HOME.rmdir()
