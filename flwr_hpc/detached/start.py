"""``python -m flwr_hpc.run … detach=true``: start a run, and leave it alone."""

from __future__ import annotations

import shlex
import subprocess
import sys

from rich.console import Console

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.config.schema import Config
from flwr_hpc.files import keep_files_private
from flwr_hpc.server import invitations, preflight, session
from flwr_hpc.server.run_dir import RunDir

POLL_S = 0.2
START_S = 120.0  # for the new process to take the run


def start(config: Config, resumed: bool, clock: Clock | None = None) -> int:
    """Start the run in a session of its own, and say how it is watched and ended.

    What OpenSSH asks for it asks here; the run finds its connections open.
    """
    preflight.check(config)
    keep_files_private()
    config.detach = False
    invitations.serve_by_ssh(config)
    run = RunDir.open(str(config.resume)) if resumed else RunDir.create(config)
    if resumed:
        run.write_config(config)
    console = Console()
    session.connect(console, run, config, resumed)
    output = run.logs / "run.log"
    with open(output, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flwr_hpc.run", f"resume={run.path}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    if code := _code_of_start(run, process, clock or SystemClock()):
        console.out(output.read_text(errors="replace"), highlight=False)
        return code
    path = shlex.quote(str(run.path))
    for line in (
        f"run directory: {run.path}",
        f"it goes on by itself (process {process.pid}, its output: {output})",
        f"watch it with: python -m flwr_hpc.watch {path}",
        f"end it with:   python -m flwr_hpc.run end={path}",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return 0


def _code_of_start(run: RunDir, process: subprocess.Popen[bytes], clock: Clock) -> int:
    """Wait until the process has taken the run; return its exit code if it has failed before."""
    deadline = clock.now() + START_S
    while clock.now() < deadline:
        if (code := process.poll()) is not None:
            return code
        if run.in_use() and run.driver() == process.pid:
            return 0
        clock.sleep(POLL_S)
    return 0
