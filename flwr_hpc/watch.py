"""Look at a run that goes on elsewhere: ``python -m flwr_hpc.watch RUN_DIR|HOST:RUN_DIR``."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from flwr_hpc.errors import UserError, exit_code
from flwr_hpc.ssh.host import SshHost, SshLostError
from flwr_hpc.ssh.python_there import look

POLL_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; leaving the view is no failure."""
    parser = argparse.ArgumentParser(
        prog="python -m flwr_hpc.watch",
        description="The live view of a run, or of a server, that another terminal or job keeps. "
        "Leave it with Ctrl-C: the run goes on.",
    )
    where = "the run's folder, e.g. runs/2026-01-31_12-00-00; HOST:FOLDER where it is on a host of "
    parser.add_argument("run_dir", help=f"{where}your ~/.ssh/config")
    parser.add_argument("--python", metavar="PATH", help="the Python there that has flwr-hpc")
    parser.add_argument("--ssh-config", metavar="FILE", help="in place of ~/.ssh/config")
    options = parser.parse_args(argv)
    host, folder = _place(options.run_dir)
    try:
        if host:
            return exit_code(lambda: _watch_there(host, folder, options.python, options.ssh_config))
        return exit_code(lambda: _watch(folder))
    except KeyboardInterrupt:
        return 0


def _place(text: str) -> tuple[str, str]:
    """Return host and folder; the host is empty where the folder is here."""
    found = re.fullmatch(r"([^/:]+):(.+)", text)
    return found.groups() if found and not Path(text).exists() else ("", text)  # type: ignore[return-value]


def _watch_there(name: str, folder: str, python: str | None, ssh_config: str | None) -> int:
    """Show what this command shows on another host."""
    with TemporaryDirectory(prefix="flwr-hpc-") as control:
        host = SshHost(name, Path(control), ssh_config)
        try:
            host.open(ask=True)
            there = look(host, python)
            if fault := there.fault(name):
                raise UserError(f"{fault}. Or name another Python there: --python PATH")
            return host.show([there.program, "-m", "flwr_hpc.watch", folder])
        except SshLostError as exc:
            raise UserError(str(exc)) from None
        except KeyboardInterrupt:
            return 0
        finally:
            host.close()


def _watch(folder: str) -> int:
    """Show the run's events as they come, until nobody works on it any more."""
    from flwr_hpc.server.run_dir import RunDir
    from flwr_hpc.tracking.events import follow
    from flwr_hpc.tracking.live import LiveView

    run = RunDir.open(folder)
    config, follower = run.config(), follow(run.events)
    with LiveView(Console(), config.rounds, run.sites(config)) as view:
        view.restore(follower.poll())
        try:
            while run.in_use():
                view.update(follower.poll())
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            return 0
        view.update(follower.poll())
        view.print_line(f"nobody works on {run.path} now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
