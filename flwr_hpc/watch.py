"""Look at a run that goes on elsewhere: ``python -m flwr_hpc.watch RUN_DIR``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from flwr_hpc.errors import exit_code

POLL_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; leaving the view is no failure."""
    parser = argparse.ArgumentParser(
        prog="python -m flwr_hpc.watch",
        description="The live view of a run, or of a server, that another terminal or job keeps. "
        "Leave it with Ctrl-C: the run goes on.",
    )
    parser.add_argument("run_dir", help="the run's folder, e.g. runs/2026-01-31_12-00-00")
    options = parser.parse_args(argv)
    try:
        return exit_code(lambda: _watch(options.run_dir))
    except KeyboardInterrupt:
        return 0


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
