"""Namespaces under a process 1 of their own: launched, asked, entered, ended."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Self

import psutil

from .host import ENV, HOME, LabError, alive, clear, run, sweep

PATIENCE_S = 300.0  # of a busy machine
ORDERLY_S = 30.0  # for a machine to end, and remove its files
SPACES = ["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--net", "--ipc"]
ENTER = ["--pid", "--mount", "--uts", "--net", "--ipc", "--"]
INIT = Path(__file__).with_name("init.py")


class Machine:
    """A login node or host by its name, with all that is behind it.

    As a context manager it is taken down at the end. It dies with the process that made it,
    unless made with ``keep``.
    """

    log = "init.log"  # whose end explains a wait that was in vain

    def __init__(self, name: str, folder: Path, lifeline: IO[str] | None = None) -> None:
        self.name, self.folder, self._lifeline = name, folder, lifeline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()

    def down(self) -> None:
        """End every process of the machine and remove its files."""
        if self._lifeline is not None:
            with contextlib.suppress(OSError):
                self._lifeline.close()
        remove(self.folder)

    def inside(self, *argv: str, node: str = "") -> list[str]:
        """Return the command that runs another one, as root, on the machine or a node of it."""
        return ["nsenter", f"--target={self.pid_1(node)}", *ENTER, *argv]

    def start(self, daemon: str, node: str = "") -> None:
        """Start a daemon of the machine (``slurmctld``, ``sshd``), ``slurmd``, or a node."""
        self.ask({"do": "start", "name": daemon}, node)

    def kill(self, daemon: str, node: str = "", number: int = 9) -> None:
        """Kill a daemon; a node's name means all that runs on it, as by a power cut."""
        self.ask({"do": "kill", "name": daemon, "signal": number}, node)

    def until(self, what: Callable[[], Any], timeout_s: float, name: str) -> None:
        """Poll until something is true."""
        deadline = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > deadline:
                log = self.folder / "log" / self.log
                tail = log.read_text().splitlines()[-12:] if log.exists() else []
                lines = "\n".join(tail)
                raise LabError(f"'{self.name}': no {name} in {timeout_s:.0f} s; {log}:\n{lines}")
            time.sleep(0.05)

    def ask(self, request: dict[str, Any], node: str = "") -> dict[str, Any]:
        """Return what process 1 answers to a request (see init.py)."""
        path = self.folder / (f"{node}.control" if node else "control")
        return ask(path, request, f"'{self.name}': {node or 'the login node'}")

    def pid_1(self, node: str = "") -> int:
        """Return the number that the machine below knows process 1 by."""
        (first,) = _supervisor(self.folder).children()
        if not node:
            return int(first.pid)
        for process in first.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # one of a job's that has just ended
                words = process.cmdline()
                if words[:1] == [sys.executable] and words[-1] == f"{self.folder}/{node}.json":
                    return int(process.pid)
        raise LabError(f"node '{node}' of '{self.name}' is down")


def ask(control: Path, request: dict[str, Any], who: str) -> dict[str, Any]:
    """Return the answer that comes from a control socket."""
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(PATIENCE_S)
            line.connect(str(control))
            line.sendall(json.dumps(request).encode() + b"\n")
            reply = json.loads(line.makefile().readline() or '{"error": "no answer"}')
    except OSError as exc:
        raise LabError(f"{who} is down: {exc}") from None
    if "error" in reply:
        raise LabError(f"{who}: {reply['error']}")
    return dict(reply)


@contextlib.contextmanager
def new_folder(name: str, kind: str, disk_mb: int | None = None) -> Iterator[Path]:
    """Claim a name: make its folder, which goes again when what should live there fails.

    With `disk_mb` it is a disk of its own, in memory.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,23}", name):
        raise LabError(f"a {kind}'s name is up to 24 of a-z, 0-9 and _, not '{name}'")
    sweep()
    folder = HOME / name
    while True:
        HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            folder.mkdir()
            break
        except FileNotFoundError:  # the last of the others has just taken `HOME` along
            continue
        except FileExistsError:
            raise LabError(f"there is a {kind} '{name}'; remove it with: down {name}") from None
    try:
        if disk_mb:
            run("mount", "-t", "tmpfs", "-o", f"size={disk_mb}m", "tmpfs", str(folder))
        (folder / "log").mkdir()
        for public in (HOME, folder, folder / "log"):
            public.chmod(0o755)  # for other users' jobs, whatever the umask
        yield folder
    except BaseException:
        remove(folder)
        raise


def launch(folder: Path, argv: list[str], log: str) -> subprocess.Popen[str]:
    """Start what a folder belongs to: the folder is swept when it has gone."""
    with open(folder / "log" / log, "w") as out:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
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


def unshare(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a process 1 in fresh namespaces, where it waits for a plan; with its pid here."""
    init = ["unshare", *SPACES, sys.executable, "-I", "-S", str(INIT), "-"]
    supervisor = launch(folder, init, "init.log")
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and supervisor.poll() is None:
        if children := psutil.Process(supervisor.pid).children():
            return supervisor, int(children[0].pid)
        time.sleep(0.01)
    raise LabError(f"unshare {' '.join(SPACES)}: no process came of it")


def boot(process: subprocess.Popen[str], plan: dict[str, Any], folder: Path) -> IO[str]:
    """Send a plan and wait until it is carried out; returns the lifeline."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(plan) + "\n")
    process.stdin.flush()
    said = json.loads(process.stdout.readline() or "{}")  # its steps have time-outs of their own
    if "up" not in said:
        words = said.get("error") or _logs(folder)[-2000:]
        raise LabError(f"'{folder.name}' does not come up: {words}")
    return process.stdin


def _logs(folder: Path) -> str:
    with contextlib.suppress(OSError):  # whoever fails removes them himself
        return "".join(path.read_text() for path in (folder / "log").glob("*.log"))
    return ""


def remove(folder: Path) -> None:
    """End what lives in a folder in good order if it lets us, else by force."""
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        if alive(folder):
            process = _supervisor(folder)
            family = process.children() or [process]
            for child in family:
                child.terminate()
            _, left = psutil.wait_procs([*family, process], timeout=ORDERLY_S)
            for other in left:
                other.kill()
            psutil.wait_procs(left, timeout=PATIENCE_S)
    clear(folder)
    with contextlib.suppress(OSError):
        HOME.rmdir()


def _supervisor(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "supervisor").read_text().split()[0]))
