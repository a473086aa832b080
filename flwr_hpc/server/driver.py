"""One command's whole session: SuperLink, a SuperNode per facility, the run, and their end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import quote

import psutil

from flwr_hpc.config.schema import Config
from flwr_hpc.errors import UserError
from flwr_hpc.files import read_json
from flwr_hpc.schedulers.base import SchedulerUnavailableError
from flwr_hpc.server.bundle import write_bundle
from flwr_hpc.server.processes import Child, Processes, free_port, ignore_signals
from flwr_hpc.server.progress import SpoolProgress
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.sites import open_sites, write_site
from flwr_hpc.site.settings import to_node_config
from flwr_hpc.tracking.events import Event, EventLog, Follower, follow
from flwr_hpc.tracking.live import LiveView

POLL_S = 0.3
RELEASE_S = 15.0  # for a released job to end
WANDB_S = 30.0  # to upload what is left
START_S = 90.0  # for Flower's processes to come up on a slow file system
FLOWER_ENV = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Outcome:
    """How a session ended: ``finished``, ``failed``, ``interrupted`` or ``lost``.

    ``lost`` means that a process of Flower's died; the run can go on from its checkpoint.
    `logged` tells whether the event log says so already.
    """

    status: str
    error: str = ""
    fatal: bool = False
    signal: int = 0
    logged: bool = False


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def drive(run: RunDir, config: Config, view: LiveView) -> Outcome:
    """Run the federation to its end, starting Flower anew when one of its processes dies.

    Whatever the end, no process is left; jobs are left only if this process is killed.
    """
    outcome = Outcome("failed", "the run could not be started")
    with _signals():
        try:
            outcome = _sessions(run, config, view)
        except Interrupted as exc:
            outcome = Outcome("interrupted", f"stopped by {exc}", signal=exc.number)
        except (OSError, RuntimeError, subprocess.SubprocessError) as exc:
            outcome = Outcome("failed", str(exc))
        finally:
            with ignore_signals():
                _clean_up(run, config, view, outcome)
    return outcome


def _sessions(run: RunDir, config: Config, view: LiveView) -> Outcome:
    follower = follow(run.events)
    view.restore(follower.poll())
    outcome = _session(run, config, follower, view)
    for _ in range(config.federation.restarts):
        if outcome.status != "lost":
            break
        view.print_line(f"{outcome.error}; starting again from the last aggregation")
        outcome = _session(run, config, follower, view)
    return outcome


def _clean_up(run: RunDir, config: Config, view: LiveView, outcome: Outcome) -> None:
    """End the jobs, and let the event log end as the run did."""
    if outcome.status == "finished":
        with suppress(SchedulerUnavailableError, OSError):  # then they are cancelled
            _let_jobs_end(run, config)
    if left := cancel_jobs(run, config):
        view.print_line(f"could not cancel every job; look for them yourself: {left}")
    if not outcome.logged:
        status = "interrupted" if outcome.status == "interrupted" else "failed"
        with suppress(OSError), EventLog(run.events, join=True) as events:
            events.emit("run_finished", status=status, error=outcome.error)
    with suppress(OSError):
        _tell_costs(run, config)


def cancel_jobs(run: RunDir, config: Config) -> str:
    """Cancel every job of this run; return what could not be, for the user."""
    left = []
    for facility, site in open_sites(run, config).items():
        try:
            site.cancel_all()
        except (SchedulerUnavailableError, OSError) as exc:
            left.append(f"{facility}: {exc}")
    return "; ".join(left)


def _let_jobs_end(run: RunDir, config: Config) -> None:
    """Give released jobs a moment to end by themselves; every look is a query."""
    deadline = time.monotonic() + RELEASE_S
    waiting = [site for site in open_sites(run, config).values() if site.live_jobs()]
    while waiting and time.monotonic() < deadline:
        time.sleep(max(1.0, min(5.0, *(site.scheduler.poll_s for site in waiting))))
        waiting = [site for site in waiting if site.live_jobs()]


def _tell_costs(run: RunDir, config: Config) -> None:
    """Write down when the last jobs ended, which nobody has asked about yet."""
    with EventLog(run.events, join=True) as events:
        for facility, site in open_sites(run, config).items():
            status = site.costs()
            events.emit("jobs_ended", facility=facility, jobs=status.jobs, ledger=status.ledger)


def _session(run: RunDir, config: Config, follower: Follower, view: LiveView) -> Outcome:
    """Start Flower, follow the run, and end every process."""
    (run.flower / "server.json").unlink(missing_ok=True)
    port = free_port()
    app = write_bundle(run.flower, f"127.0.0.1:{port}")
    sites = {facility: write_site(run, config, facility) for facility in config.facilities}
    with Processes(run.logs, flower_env(run), run.lock_fd(), view.print_line) as processes:
        superlink = Child("superlink", lambda: _superlink(port))
        processes.start(superlink)
        if config.tracking.wandb:
            processes.start(Child("wandb", lambda: _wandb(run), needed=False))
        _wait_until_up(superlink, port, run.logs / "superlink.log")
        for facility, site in sites.items():
            processes.start(_supernode(facility, port, site))
        processes.run(_flwr_run(app, run))
        progress = SpoolProgress({f: run.site_root(config, f) for f in sites})
        outcome = _follow(run, processes, follower, progress, view)
        processes.wait("wandb", WANDB_S)
        return outcome


def _follow(
    run: RunDir, processes: Processes, follower: Follower, progress: SpoolProgress, view: LiveView
) -> Outcome:
    """Show the run's events until it ends, or one of its processes does."""
    started = time.monotonic()
    while True:
        gone = processes.tend()
        server = _server_state(run)
        events = follower.poll()  # after the looks above, so that no last word is missed
        view.update([*events, *progress.poll()])
        for event in events:
            if event["event"] == "run_finished":
                return _finished(event, processes)
        if gone:
            return _lost(gone[0], run)
        if server == "dead":
            return Outcome("lost", "the ServerApp died")
        if server == "absent" and time.monotonic() - started > START_S:
            tail = _tail(run.logs / "superlink.log")
            return Outcome("failed", f"the ServerApp did not start:\n{tail}")
        time.sleep(POLL_S)


def _finished(event: Event, processes: Processes) -> Outcome:
    """Return what the ServerApp said; it fails when SuperLink dies, which is not its fault."""
    fatal = bool(event.get("fatal"))
    if event["status"] == "failed" and not fatal:
        time.sleep(1.0)
        if gone := processes.tend():
            return Outcome("lost", f"{gone[0].name} ended")
    return Outcome(event["status"], event["error"], fatal, logged=True)


def _lost(child: Child, run: RunDir) -> Outcome:
    log = run.logs / f"{child.name}.log"
    if child.restartable:
        return Outcome("failed", f"{child.name} does not stay up:\n{_tail(log)}")
    return Outcome("lost", f"{child.name} ended")


def _server_state(run: RunDir) -> str:
    """Return ``absent`` (not started yet), ``alive`` or ``dead``."""
    server = read_json(run.flower / "server.json")
    if server is None:
        return "absent"
    try:
        status = psutil.Process(int(server["pid"])).status()
    except psutil.NoSuchProcess:
        return "dead"
    return "dead" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "alive"


def _superlink(port: int) -> list[str]:
    return [
        _tool("flower-superlink"),
        "--insecure",  # loopback only
        "--host=127.0.0.1",
        f"--port={port}",
        "--disable-runtime-dependency-installation",
    ]


def _supernode(facility: str, port: int, site: Path) -> Child:
    def command() -> list[str]:
        return [
            _tool("flower-supernode"),
            "--insecure",
            f"--superlink=127.0.0.1:{port}",
            f"--port={free_port()}",
            f"--node-config={to_node_config(site)}",
        ]

    return Child(f"supernode-{facility}", command, restartable=True)


def _wandb(run: RunDir) -> list[str]:
    return [sys.executable, "-m", "flwr_hpc.server.wandb_follow", str(run.path)]


def _flwr_run(app: Path, run: RunDir) -> list[str]:
    setting = f'run-dir="{quote(str(run.path))}"'
    return [_tool("flwr"), "run", str(app), "flwr-hpc", "-c", setting, "--format=json"]


def flower_env(run: RunDir) -> dict[str, str]:
    """Return the environment of Flower's processes.

    They import what this process can (a checkout, a strategy beside it) and find each
    other's programs although the virtual environment may not be activated.
    """
    paths = [Path(p or ".").absolute() for p in sys.path]
    installed = (Path(sys.prefix), Path(sys.base_prefix))
    own = [str(p) for p in paths if not any(p.is_relative_to(i) for i in installed)]
    programs = str(Path(sys.executable).parent)
    return {
        **FLOWER_ENV,
        "FLWR_HOME": str(run.flower),
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(own)),
    }


def _tool(name: str) -> str:
    """Return a program of this Python environment, activated or not."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise UserError(f"the program '{name}' is not installed. Fix it with: pip install flwr")
    return found


def _wait_until_up(superlink: Child, port: int, log: Path) -> None:
    """Wait until our SuperLink, and no other process, listens on the port."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and not superlink.dead():
        if port in superlink.listening():
            return
        time.sleep(0.1)
    raise RuntimeError(f"SuperLink did not start:\n{_tail(log)}")


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that ask us to stop into `Interrupted`."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
