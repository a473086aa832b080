"""One training by hosts of the lab that share nothing, all of it from one command at the first."""

from __future__ import annotations

import sys
from pathlib import Path

from lab.centres import Centres
from lab.remote import Host
from worlds.runs.across import DATA, SETTINGS, Across


class BySsh(Across):
    """`run` at one host, sites behind its user's SSH connections.

    Takes what `Across` takes, and the folder of a checkpoint that each host gets a copy of.
    """

    def __init__(
        self, centres: Centres, logs: Path, *settings: str, base: Path | None = None
    ) -> None:
        super().__init__(centres, logs, *settings)
        self.base = base
        for host in (self.server, *self.sites) if base else ():
            host.copy(base, f"/home/{host.user}/base")
        for site in self.sites:
            file = f"conf/facility/{site.name}.yaml"
            text = site.outside(f"/home/{site.user}/{file}").read_text()
            self.server.write(f"/home/{self.server.user}/{file}", text)

    def home(self, site: Host) -> str:
        return f"/home/{site.user}/flwr-hpc"

    def begin(self) -> None:
        """Type the one command."""
        own = ["--config-dir=conf", f"+facility=[{','.join(site.name for site in self.sites)}]"]
        for site in self.sites:
            key = f"facilities.{site.name}"
            own += [f"{key}.ssh={site.name}", f"{key}.ssh_python={sys.executable}"]
            own += [f"{key}.ranks_per_node=1", f"data.paths.{site.name}=[{DATA[site.name]}]"]
            if self.base:
                own.append(f'{key}.join=["model.path=/home/{site.user}/base"]')
        if self.base:
            own.append(f"model.path=/home/{self.server.user}/base")
        words = (f"run_dir={self.run_dir}", *own, *SETTINGS, *self.settings)
        self.type(self.server, "flwr_hpc.run", *words)

    def connections(self) -> list[tuple[Host, int]]:
        """Return the ends of SSH's connections: host and process."""
        found = [(self.server, pid) for pid in _processes(self.server, "ssh", " -M -N ")]
        for site in self.sites:  # what serves a connection there runs as its user
            found += [(site, pid) for pid in _processes(site, "sshd", f"{site.user}@notty")]
        return found


def _processes(host: Host, program: str, words: str) -> list[int]:
    lines = host.run("ps", "-U", host.user, "-o", "pid=", "-o", "args=").splitlines()
    found = (line.split(maxsplit=1) for line in lines)
    return [int(pid) for pid, args in found if args.startswith(program) and words in args]
