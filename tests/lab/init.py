"""Process 1 of a login node or compute node: boots it, keeps its daemons, dies with all of them.

Run as ``python -I init.py PLAN`` inside fresh namespaces; ``PLAN`` is a file, or ``-`` for the
first line of standard input, whose end then ends the node (unless the plan says ``keep``).
A plan is a JSON object::

    hostname, folder, control    the node's name, its cluster's folder, its control socket
    remove                       whether the folder goes with the node
    reboots                      the daemons that a reboot of the host kills and starts
    steps                        [{"run": argv, "stdin": text}], or
                                 [{"start": name, "argv": ..., "log": path, "ready": probe,
                                 "step_s": how long it may take}]

where a probe is ``{"socket": path}``, ``{"tcp": [host, port]}`` or ``{"command": argv}``.
Requests come one per connection to the control socket: ``{"do": "start" | "kill" | "alive",
"name": ...}``, with ``signal`` for ``kill``; ``{"do": "reboot"}`` or ``{"do": "down"}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEP_S = 300.0
ASKED_S = 60.0  # for a request to come, and its answer to go


class LabError(Exception):
    """A step of the boot, or a request, failed; the message says why."""


class Init:
    """Boots a node and serves requests about its daemons."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.daemons = {s["start"]: s for s in plan["steps"] if "start" in s}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def boot(self) -> None:
        socket.sethostname(self.plan["hostname"])
        for step in self.plan["steps"]:
            if "start" in step:
                self.start(step["start"])
            else:
                _run(step["run"], step.get("stdin"))

    def start(self, name: str) -> None:
        """Start a daemon and wait until it is ready."""
        step = self.daemons[name]
        if self.alive(name):
            return
        env = {**os.environ, **step.get("env", {})}
        with open(step["log"], "ab") as log:
            self.running[name] = subprocess.Popen(
                step["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        deadline = time.monotonic() + step.get("step_s", STEP_S)
        while not _ready(step.get("ready", {})):
            if not self.alive(name) or time.monotonic() > deadline:
                state = "is not ready" if self.alive(name) else "ended at once"
                raise LabError(f"{name} {state}; the end of {step['log']}:\n{_tail(step['log'])}")
            time.sleep(0.02)

    def kill(self, name: str, number: int) -> None:
        """Send a daemon a signal and wait for its end; of a node, all of it."""
        if not self.alive(name):
            return
        process = self.running[name]
        children = _children(process.pid) if self.daemons[name].get("node") else []
        os.kill(children[0] if children else process.pid, number)
        deadline = time.monotonic() + STEP_S
        while self.alive(name):
            if time.monotonic() > deadline:
                raise LabError(f"{name} does not end on signal {number}")
            time.sleep(0.01)

    def alive(self, name: str) -> bool:
        process = self.running.get(name)
        return process is not None and process.poll() is None

    def serve(self, lifeline: int | None) -> None:
        """Answer requests until told to end, or until whoever holds the lifeline has gone."""
        woken, wake = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _note)
        door = socket.socket(socket.AF_UNIX)
        Path(self.plan["control"]).unlink(missing_ok=True)
        door.bind(self.plan["control"])
        door.listen()
        watched = selectors.DefaultSelector()
        watched.register(woken, selectors.EVENT_READ)
        watched.register(door, selectors.EVENT_READ)
        if lifeline is not None:
            watched.register(lifeline, selectors.EVENT_READ)
        self.reap()
        while True:
            for key, _ in watched.select():
                if key.fileobj is woken:
                    numbers = woken.recv(4096)  # first: who ends while we reap wakes us again
                    self.reap()
                    if set(numbers) & {signal.SIGTERM, signal.SIGINT}:
                        return
                elif key.fileobj is door:
                    if not self.answer(door.accept()[0]):
                        return
                elif not os.read(lifeline or 0, 4096):
                    return

    def reap(self) -> None:
        """Collect the orphans that process 1 inherits."""
        ours = {p.pid: p for p in self.running.values()}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in ours:
                    ours[ended[0]].returncode = os.waitstatus_to_exitcode(ended[1])

    def answer(self, caller: socket.socket) -> bool:
        """Serve one request; returns whether to go on."""
        with caller, contextlib.suppress(OSError):
            caller.settimeout(ASKED_S)
            request = json.loads(caller.makefile().readline() or "{}")
            reply: dict[str, Any] = {}
            try:
                reply["alive"] = self.act(request)
            except (LabError, KeyError, OSError) as exc:
                reply["error"] = str(exc)
            caller.sendall(json.dumps(reply).encode() + b"\n")
            return bool(request.get("do") != "down")
        return True

    def act(self, request: dict[str, Any]) -> bool:
        match request["do"]:
            case "start":
                self.start(request["name"])
            case "kill":
                self.kill(request["name"], request["signal"])
            case "reboot":
                self.reboot()
                return True
            case "down":
                return False
        return self.alive(request["name"])

    def reboot(self) -> None:
        """Kill what runs here, then start what starts with a host.

        A cluster's daemons stay: they stand for other machines.
        """
        ours = self.plan.get("reboots", [])
        stays = [p.pid for name, p in self.running.items() if name not in ours]
        deadline = time.monotonic() + STEP_S
        while left := _others(stays):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            if time.monotonic() > deadline:
                raise LabError(f"processes {left} do not end")
            time.sleep(0.01)
        for name in ours:
            self.start(name)

    def end(self) -> None:
        """Kill every process of the namespace, then remove what it left on the disk."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        if not self.plan.get("remove"):
            return
        for folder in self.plan.get("mounts", []):
            subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)
        shutil.rmtree(self.plan["folder"], ignore_errors=True)


def _note(number: int, frame: object) -> None:
    """Exist, so that the signal reaches the wake-up descriptor."""


def _run(argv: list[str], text: str | None) -> None:
    try:
        done = subprocess.run(
            argv, input=text or "", capture_output=True, text=True, timeout=STEP_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(argv)}: no end in {STEP_S:.0f} s") from None
    if done.returncode:
        said = (done.stderr + done.stdout).strip()[-2000:]
        raise LabError(f"{' '.join(argv)}: exit code {done.returncode}: {said}")


def _ready(probe: dict[str, Any]) -> bool:
    if "socket" in probe:
        return _connects(socket.AF_UNIX, probe["socket"])
    if "tcp" in probe:
        return _connects(socket.AF_INET, tuple(probe["tcp"]))
    if "command" in probe:
        return not subprocess.run(
            probe["command"], capture_output=True, timeout=STEP_S, check=False
        ).returncode
    return True


def _connects(family: socket.AddressFamily, address: Any) -> bool:
    with socket.socket(family) as probe:
        probe.settimeout(2)
        return probe.connect_ex(address) == 0


def _children(pid: int) -> list[int]:
    return [child for child, parent in _parents().items() if parent == pid]


def _parents() -> dict[int, int]:
    """Return every live process's parent; 0 for one that came in from outside."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def _others(roots: list[int]) -> list[int]:
    """Return all processes but process 1 and the families of some."""
    parents = _parents()
    kept = {1, *roots}
    while more := {pid for pid, parent in parents.items() if parent in kept - {1}} - kept:
        kept |= more
    return [pid for pid in parents if pid not in kept]


def _tail(path: str) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(Path(path).read_text(errors="replace").splitlines()[-12:])
    return ""


def main() -> None:
    from_parent = sys.argv[1] == "-"
    plan = json.loads(sys.stdin.readline() if from_parent else Path(sys.argv[1]).read_text())
    init = Init(plan)
    try:
        init.boot()
        if from_parent:
            print(json.dumps({"up": True}), flush=True)
        init.serve(0 if from_parent and not plan.get("keep") else None)
    except (LabError, OSError, subprocess.SubprocessError) as exc:
        with contextlib.suppress(OSError):  # nobody may be listening any more
            print(json.dumps({"error": str(exc)}), flush=True)
    finally:
        init.end()


if __name__ == "__main__":
    main()
