"""One training by hosts of the lab that share nothing: `serve` at one, `join` at the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.centres import Centres
from lab.remote import Host, Process
from worlds.files import paths_under
from worlds.jobs import until
from worlds.runs.run import SMALL

from flwr_hpc.files import read_json
from flwr_hpc.tracking.events import read

PORT = 8443
# As SMALL, but who trains is up to the sites.
SETTINGS = [s for s in SMALL if "local_" not in s and not s.startswith("train.steps=")]
DATA = {"centre_a": "json", "centre_b": "logging"}
THREADS = {"OMP_NUM_THREADS": "1"}


class Joined:
    """The commands that the persons at the hosts have typed; what they print goes to `logs`."""

    def __init__(self, centres: Centres, logs: Path, *settings: str) -> None:
        self.server, *self.sites = centres.hosts.values()
        self.run_dir = f"/home/{self.server.user}/run"
        self.logs, self.settings = logs, settings
        self.serving: Process
        self.joined: dict[str, Process] = {}

    def serve(self) -> None:
        """Start the server."""
        names = ",".join(site.name for site in self.sites)
        where = [f"serve.address={self.server.name}:{PORT}", f"serve.sites=[{names}]"]
        self._serve(f"run_dir={self.run_dir}", *where, *SETTINGS, *self.settings)

    def resume(self) -> None:
        """Type what the manual says after the server's end."""
        self._serve(f"resume={self.run_dir}")

    def _serve(self, *settings: str) -> None:
        self.serving = self._type(self.server, "flwr_hpc.serve", *settings)

    def deliver(self) -> None:
        """Hand each invitation to its site's person, as soon as it is written."""
        for site in self.sites:
            letter = self.path(f"invitations/{site.name}.json")
            self.until(lambda letter=letter: letter.exists())  # type: ignore[misc]
            site.write(f"/home/{site.user}/{site.name}.json", letter.read_text())

    def join(self, site: Host) -> None:
        """Join, or go on: the same command."""
        name = site.name
        own = ["--config-dir=conf", f"+facility={name}", f"facilities.{name}.ranks_per_node=1"]
        own += [f"data.paths=[{DATA[name]}]", f"site.dir=/home/{site.user}/site"]
        self.joined[name] = self._type(site, "flwr_hpc.join", f"{name}.json", *own)

    def begin(self) -> None:
        """Do all that is to be done for a run to begin."""
        self.serve()
        self.deliver()
        for site in self.sites:
            self.join(site)

    def end(self) -> None:
        """Wait for the end of all commands; they end well."""
        for process in (self.serving, *self.joined.values()):
            self.until(lambda process=process: process.poll() is not None)  # type: ignore[misc]
            assert process.returncode == 0, self.said()

    def path(self, name: str) -> Path:
        """Return where a file of the run directory lies on the machine below."""
        return self.server.outside(f"{self.run_dir}/{name}")

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.path("events.jsonl")
        events = read(path) if path.exists() else []  # a torn line is none
        return [event for event in events if event["event"] == name]

    def orders(self, site: Host) -> list[str]:
        """Return the training orders that a site works on, or has worked on since the last one."""
        home = site.outside(f"/home/{site.user}/site")
        paths = (path for path in paths_under(home) if path.name == "order.json")
        orders = (value["order"] for path in paths if (value := read_json(path)))  # else: pruned
        return [str(order["version"]) for order in orders if order["kind"] == "train"]

    def until(self, what: Any) -> Any:
        """Poll until something is true, as long as anything moves at any host."""
        homes = [host.outside(f"/home/{host.user}") for host in (self.server, *self.sites)]

        def look() -> Any:
            found = what()
            gone = [p for p in (self.serving, *self.joined.values()) if p.poll() not in (None, 0)]
            assert found or not gone, self.said()
            return found

        return until(look, *homes, self.logs, explain=self.said, pause_s=0.2)

    def said(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text()[-4000:]}" for p in self.logs.glob("*.out"))

    def _type(self, host: Host, *words: str) -> Process:
        with open(self.logs / f"{host.name}.out", "ab") as out:
            module = ["python", "-m", *words]
            return host.popen(*module, env=THREADS, stdin=-3, stdout=out, stderr=out)
