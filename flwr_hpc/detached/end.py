"""``python -m flwr_hpc.run end=RUN_DIR``: end a run, and what it has left, on every host."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.errors import UserError
from flwr_hpc.files import keep_files_private
from flwr_hpc.server.driver import cancel_jobs
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.ssh.attendant import remote_sites
from flwr_hpc.ssh.host import SshLostError
from flwr_hpc.ssh.remote_site import RemoteSite

POLL_S = 0.5
STOP_S = 240.0  # for a run that goes on to end its jobs


def end(folder: str, clock: Clock | None = None) -> int:
    """End the run's process, its jobs, its sites on other hosts; return 1 if something is left."""
    keep_files_private()
    run = RunDir.open(folder)
    config = run.config()
    _stop(run, clock or SystemClock())
    left = []
    with run.lock():
        if why := cancel_jobs(run, config):
            left.append(f"could not cancel every job; look for them yourself: {why}")
        elif config.here:
            print(f"{', '.join(config.here)}: no job of the run is left")
        sites = remote_sites(config, run.key, run.invitations, run.ssh)
        try:
            for site in sites:
                well, words = _end_site(site)
                print(f"{site.name}: {words}") if well else left.append(f"{site.name}: {words}")
        finally:
            for site in sites:
                site.host.close()
    for line in left:
        print(line)
    print(f"to go on with what was trained: python -m flwr_hpc.run resume={run.path}")
    return 1 if left else 0


def _stop(run: RunDir, clock: Clock) -> None:
    """Let the process that works on the run end it, as by Ctrl-C."""
    if not run.in_use():
        return
    if pid := run.driver():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = clock.now() + STOP_S
    while run.in_use() and clock.now() < deadline:
        clock.sleep(POLL_S)
    if not run.in_use():  # else the lock is refused, with words
        print(f"its process ({pid}) has been stopped")


def _end_site(site: RemoteSite) -> tuple[bool, str]:
    """End a site on another host; return whether that went well, and how it went."""
    if not site.known.folder:
        return True, "nothing was started there"
    try:
        site.host.open(ask=True)
        return True, site.end()
    except (SshLostError, UserError) as exc:
        return False, f"{exc}. Then type this again; or, on that host: {site.by_hand}"
