"""A run with one site of this machine and one behind a real sshd."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from worlds.files import paths_under
from worlds.jobs import command_line
from worlds.network.sshd import Sshd
from worlds.runs.run import SMALL, Run

# Small payloads, too, travel through the port; a site that is away is waited for.
THROUGH_THE_PORT = "exchange.inline_below_mb=0"


class SshRun(Run):
    """One command; its facility ``local_b`` is on the host ``far``."""

    def __init__(self, folder: Path, server: Sshd, *words: str, resume: bool = False) -> None:
        self.server = server
        by_ssh = [
            f"facilities.local_b.ssh_python={sys.executable}",
            "facilities.local_b.ssh=far",
            f"ssh_config={server.config}",
            THROUGH_THE_PORT,
        ]
        settings: Sequence[str] = [*SMALL, *by_ssh]
        super().__init__(folder, *words, resume=resume, settings=settings)

    @property
    def there(self) -> Path:
        """The site's folder on the other host."""
        (folder,) = (self.server.home / "flwr-hpc").iterdir()
        return folder

    def line(self) -> psutil.Process | None:
        """Return the control connection, this end."""
        found = self.find("ssh", "-M", "-N", str(self.server.config))
        return found[0] if found else None

    def jobs_there(self) -> list[str]:
        """Return the jobs that were submitted there, by allocation."""
        return sorted(p.parent.name for p in self.paths_there("job"))

    def trains_there(self) -> bool:
        """Whether an order is worked on there at this moment."""
        return any(
            not (p.parent / "result.json").exists() for p in self.paths_there("progress.json")
        )

    def paths_there(self, name: str) -> list[Path]:
        return [p for p in paths_under(self.server.home) if p.name == name]

    def left_there(self) -> list[str]:
        """Return the processes that still work there."""
        mine = [p for p in psutil.process_iter() if str(self.server.home) in command_line(p)]
        return [f"{p.pid} {command_line(p)}" for p in mine if "pytest" not in command_line(p)]
