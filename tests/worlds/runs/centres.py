"""A server and sites that join it, each a command in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
from worlds.files import paths_under
from worlds.jobs import below, command_line, send, until
from worlds.network.ports import reserve_port
from worlds.runs.run import ROOT, SMALL

from flwr_hpc.files import read_json
from flwr_hpc.tracking.events import read

T = TypeVar("T")
OF_A_SITE = ("data.paths", "+facility", "facilities.")
RUN = [setting for setting in SMALL if not setting.startswith(OF_A_SITE)]
OWN = ("+facility=local_a", "facilities.local_a.ranks_per_node=1", "site.dir=here")


def environment() -> dict[str, str]:
    """Return what our commands find here, in any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Command:
    """One of our commands in the foreground of a folder."""

    def __init__(self, folder: Path, module: str, *words: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.output = folder, folder / f"{module}.out"
        with open(self.output, "ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"flwr_hpc.{module}", *words],
                stdout=out, stderr=out, cwd=folder, env=environment(), start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        logs = [p for p in paths_under(self.folder) if p.match("logs/*.log") and p.is_file()]
        tails = [f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in logs]
        return "\n".join([self.output.read_text(errors="replace"), *tails])

    def kill(self) -> None:
        """As a rebooting host would."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Centres:
    """A server for two sites, ``a`` and ``b``; nothing of one lies in another's folder."""

    def __init__(self, base: Path, *settings: str) -> None:
        self.base, self.run = base, base / "server" / "run"
        self._reserved = reserve_port()
        self.port = self._reserved.getsockname()[1]
        address = f"serve.address=127.0.0.1:{self.port}"
        self.commands: dict[str, Command] = {}
        self.serve(address, "serve.sites=[a,b]", "run_dir=run", *RUN, *settings)

    def serve(self, *words: str) -> None:
        self.commands["server"] = Command(self.base / "server", "serve", *words)

    def change(self, action: str, site: str) -> str:
        """Invite or revoke a site while the server runs."""
        command = [sys.executable, "-m", "flwr_hpc.serve", action, site, str(self.run)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def invitation(self, site: str) -> Path:
        """Carry a site's invitation to its centre."""
        sent, here = self.run / "invitations" / f"{site}.json", self.base / site
        self.until(lambda: sent.exists() and json.loads(sent.read_text()))
        here.mkdir(exist_ok=True)
        return Path(shutil.copy(sent, here / "invitation.json"))

    def join(self, site: str, package: str, *more: str) -> None:
        path = self.base / site / "invitation.json"
        if not path.exists():
            self.invitation(site)
        words = (path.name, *OWN, f"data.paths=[{package}]", *more)
        self.commands[site] = Command(self.base / site, "join", *words)

    def kill_supernode(self, site: str) -> None:
        """Kill a site's SuperNode while it has a message in hand; the site starts another."""

        def holds_a_message() -> bool:
            signs = [read_json(p) for p in (self.base / site).glob("here/**/answering.json")]
            return any(sign is not None and not sign["answered"] for sign in signs)

        family = below(psutil.Process(self.commands[site].process.pid))
        found = [p for p in family if "flower-supernode" in command_line(p)]
        node = min(found, key=psutil.Process.create_time)  # what it forks has its command line
        self.until(holds_a_message)
        send(signal.SIGKILL, [node])

    def said(self) -> str:
        return "\n".join(f"=== {name}\n{c.said()}" for name, c in self.commands.items())

    def until(self, what: Callable[[], T]) -> T:
        """Poll until `what` returns something true, as long as anything moves."""

        def look() -> T:
            value = what()
            ended = [n for n, c in self.commands.items() if c.process.poll() not in (None, 0)]
            assert value or not ended, f"{ended} ended early:\n{self.said()}"
            return value

        return until(look, self.base, explain=self.said)

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.run / "events.jsonl"
        events = read(path) if path.exists() else []  # a torn line is none
        return [e for e in events if e["event"] == name]

    def codes(self) -> dict[str, int]:
        """Wait for every command's exit code."""
        self.until(lambda: all(c.process.poll() is not None for c in self.commands.values()))
        return {name: c.process.wait() for name, c in self.commands.items()}

    def end(self) -> None:
        for command in self.commands.values():
            if command.process.poll() is None:
                command.process.terminate()
                command.process.wait()
        self._reserved.close()
