"""One training by hosts of the lab that share nothing: `serve` at one, `join` at the others."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

from lab.remote import Host
from worlds.files import paths_under
from worlds.runs.across import DATA, SETTINGS, Across

from flwr_hpc.files import read_json

PORT = 8443


class Joined(Across):
    """The commands that the persons at the hosts have typed."""

    def home(self, site: Host) -> str:
        return f"/home/{site.user}/site"

    def serve(self) -> None:
        """Start the server."""
        names = ",".join(site.name for site in self.sites)
        where = (f"serve.address={self.server.name}:{PORT}", f"serve.sites=[{names}]")
        words = (f"run_dir={self.run_dir}", *where, *SETTINGS, *self.settings)
        self.type(self.server, "flwr_hpc.serve", *words)

    def resume(self) -> None:
        """Type what the manual says after the server's end."""
        self.type(self.server, "flwr_hpc.serve", f"resume={self.run_dir}")

    def deliver(self) -> None:
        """Hand each invitation to its site's person, as soon as it is written."""
        for site in self.sites:
            letter = self.path(f"invitations/{site.name}.json")
            self.until(lambda letter=letter: letter.exists())  # type: ignore[misc]
            site.write(f"/home/{site.user}/{site.name}.json", letter.read_text())

    def join(self, site: Host) -> None:
        """Join, or go on: the same command."""
        name = site.name
        own = ("--config-dir=conf", f"+facility={name}", f"facilities.{name}.ranks_per_node=1")
        where = (f"data.paths=[{DATA[name]}]", f"site.dir={self.home(site)}")
        self.type(site, "flwr_hpc.join", f"{name}.json", *own, *where)

    def begin(self) -> None:
        """Do all that is to be done for a run to begin."""
        self.serve()
        self.deliver()
        for site in self.sites:
            self.join(site)

    def fetched(self, site: Host) -> float:
        """Return which share of a payload a site has fetched so far; 0 if it fetches none now."""
        for marks in _ending(site, self.home(site), ".marks"):
            with suppress(FileNotFoundError):  # whole by now
                total = marks.with_suffix(".part").stat().st_size
                came = sum(n for (n,) in struct.iter_unpack("<I", marks.read_bytes()))
                return came / total if total else 0.0
        return 0.0

    def sent(self, site: Host) -> float:
        """Return which share of a payload the server has of a site; 0 if it sends none now."""
        node = (read_json(self.path("invitations/credentials.json")) or {})[site.name]["node_id"]
        for partial in _ending(self.server, f"{self.run_dir}/exchange/node-{node}", ".partial"):
            with suppress(FileNotFoundError):
                return partial.stat().st_size / int(partial.name.split(".")[2])
        return 0.0


def _ending(host: Host, folder: str, suffix: str) -> list[Path]:
    return [path for path in paths_under(host.outside(folder)) if path.suffix == suffix]
