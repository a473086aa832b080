"""One command's whole session: SuperLink, a SuperNode per facility, the run, and their end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import psutil

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.config.invitation import versions
from flwr_hpc.config.schema import Config
from flwr_hpc.files import (
    disk_trouble,
    explain_disk_trouble,
    is_disk_trouble,
    read_json,
    wait_until_writable,
)
from flwr_hpc.flower import commands
from flwr_hpc.flower.processes import (
    Child,
    Processes,
    ignore_signals,
    reserve_port,
    tail,
    wait_until_up,
)
from flwr_hpc.schedulers.base import SchedulerUnavailableError
from flwr_hpc.server import invitations
from flwr_hpc.server.bundle import write_bundle
from flwr_hpc.server.progress import DiskWatch, SlowStarts, SpoolProgress
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.sites import open_sites, write_site
from flwr_hpc.spool import retention
from flwr_hpc.ssh.attendant import NOBODY, Attendants
from flwr_hpc.tracking.events import Event, EventLog, Follower, follow
from flwr_hpc.tracking.live import LiveView

POLL_S = 0.3
RELEASE_S = 60.0  # for released jobs to end, before they are cancelled
WANDB_S = 30.0  # to upload what is left


@dataclass(frozen=True)
class SessionOutcome:
    """How a session ended."""

    # ``finished``, ``failed``, ``interrupted``, or ``lost``: a process of Flower's died, and the
    # run can go on from its checkpoint.
    status: str
    error: str = ""
    fatal: bool = False  # Trying again will not fix it
    signal: int = 0  # What interrupted it
    logged: bool = False  # Whether the event log says so already


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class _Watch:
    """What the driver listens to beside its processes, and where it is shown."""

    follower: Follower
    view: LiveView
    attendants: Attendants


def drive(
    run: RunDir, config: Config, view: LiveView, attendants: Attendants = NOBODY
) -> SessionOutcome:
    """Run the federation to its end, starting Flower anew when one of its processes dies.

    Whatever the end, no process is left; jobs are left only if this process is killed.
    """
    outcome = SessionOutcome("failed", "the run could not be started")
    with signals():
        try:
            outcome = _sessions(run, config, view, attendants=attendants)
        except Interrupted as exc:
            outcome = SessionOutcome("interrupted", f"stopped by {exc}", signal=exc.number)
        except (OSError, RuntimeError, subprocess.SubprocessError) as exc:
            outcome = SessionOutcome("failed", str(exc))
        finally:
            with ignore_signals():
                for facility, note in attendants.finish(outcome.status == "finished"):
                    view.print_line(f"{facility}: {note}")
                _clean_up(run, config, view, outcome)
    return outcome


def _sessions(
    run: RunDir,
    config: Config,
    view: LiveView,
    clock: Clock | None = None,
    *,
    attendants: Attendants = NOBODY,
) -> SessionOutcome:
    """Give Flower several tries; one that the disk has ended is none, and the disk waited for."""
    watch = _Watch(follow(run.events), view, attendants)
    view.restore(watch.follower.poll())
    failed = 0
    while True:
        outcome, trouble = _session_or_trouble(run, config, watch, 2**failed)
        if outcome.status == "finished" or outcome.fatal:
            return outcome
        if trouble:
            view.print_line(f"{outcome.error}; {trouble}")
            wait_until_writable(run.path, (clock or SystemClock()).sleep)
            view.print_line(f"{run.path} can be written again; starting from the last aggregation")
            continue
        failed += 1
        if outcome.status != "lost" or failed > config.federation.restarts:
            return outcome
        view.print_line(f"{outcome.error}; starting again from the last aggregation")


def _session_or_trouble(
    run: RunDir, config: Config, watch: _Watch, patience: int
) -> tuple[SessionOutcome, str]:
    """Run a session; return also what is wrong with the disk, if it did not finish."""
    try:
        outcome = _session(run, config, watch, commands.START_S * patience)
    except OSError as exc:
        if not is_disk_trouble(exc):
            raise
        trouble = explain_disk_trouble(exc, Path(exc.filename or run.path))
        return SessionOutcome("lost", "Flower could not be started"), trouble
    with suppress(OSError):  # away for a moment: nothing is learnt by this look
        return outcome, disk_trouble(run.path)
    return outcome, ""


def _clean_up(run: RunDir, config: Config, view: LiveView, outcome: SessionOutcome) -> None:
    """End the jobs, and let the event log end as the run did."""
    if outcome.status == "finished":
        with suppress(SchedulerUnavailableError, OSError):  # then they are cancelled
            let_jobs_end(run, config)
    if left := cancel_jobs(run, config):
        view.print_line(f"could not cancel every job; look for them yourself: {left}")
    elif outcome.status == "finished":
        clear_sites(run, config)
    if not outcome.logged:
        status = "interrupted" if outcome.status == "interrupted" else "failed"
        with suppress(OSError), EventLog(run.events, join=True) as events:
            events.emit("run_finished", status=status, error=outcome.error)
    with suppress(OSError):
        _record_costs(run, config)


def cancel_jobs(run: RunDir, config: Config) -> str:
    """Cancel every job of this run; return what could not be, for the user."""
    left = []
    for facility, site in open_sites(run, config).items():
        try:
            site.cancel_all()
        except (SchedulerUnavailableError, OSError) as exc:
            left.append(f"{facility}: {exc}")
    return "; ".join(left)


def let_jobs_end(run: RunDir, config: Config) -> None:
    """Give released jobs a moment to end by themselves; every look is a query."""
    deadline = time.monotonic() + RELEASE_S
    waiting = [site for site in open_sites(run, config).values() if site.live_jobs()]
    while waiting and time.monotonic() < deadline:
        time.sleep(max(1.0, min(5.0, *(site.scheduler.poll_s for site in waiting))))
        waiting = [site for site in waiting if site.live_jobs()]


def clear_sites(run: RunDir, config: Config) -> None:
    """Leave of the sites of a run that is over, with its jobs, the last checkpoint and the logs."""
    with suppress(OSError):
        for site in open_sites(run, config).values():
            with site.spool.lock():
                retention.clear(site.spool)


def _record_costs(run: RunDir, config: Config) -> None:
    """Write down when the last jobs ended, which nobody has asked about yet."""
    with EventLog(run.events, join=True) as events:
        for facility, site in open_sites(run, config).items():
            status = site.costs()
            events.emit("jobs_ended", facility=facility, jobs=status.jobs, ledger=status.ledger)


def _session(run: RunDir, config: Config, watch: _Watch, start_s: float) -> SessionOutcome:
    """Start Flower, follow the run, and end every process."""
    run.server_file.unlink(missing_ok=True)
    sites = {facility: write_site(run, config, facility) for facility in config.here}
    shared = config.federation.shared_host
    with ExitStack() as stack:

        def reserve() -> int:
            return stack.enter_context(reserve_port())

        port = reserve()
        public = public_socket(run, config)
        certificate = run.certificate if public else None
        app = write_bundle(run.flower, f"127.0.0.1:{port}", certificate)
        own = stack.enter_context(
            TemporaryDirectory(prefix="flwr-hpc-", ignore_cleanup_errors=True)
        )
        env, say = commands.environment(run.flower), watch.view.print_line
        processes = stack.enter_context(Processes(run.logs, env, run.lock_fd(), say))
        superlink = commands.superlink(port, shared, public)
        processes.start(superlink)
        processes.start(commands.fork_server(run.flower, Path(own)))
        if config.tracking.wandb:
            follow_run = [sys.executable, "-m", "flwr_hpc.server.wandb_follow", str(run.path)]
            processes.start(Child("wandb", lambda: follow_run, needed=False))
        try:
            wait_until_up(superlink, port, run.logs / "superlink.log", start_s)
            if public:
                invitations.register(run, partial(processes.run, timeout_s=start_s), anew=True)
            for facility, site in sites.items():
                own_node = _supernode(run, config, facility, port, reserve, site)
                processes.start(own_node)
            processes.run(commands.flwr_run(app, run.path), start_s)
        except (RuntimeError, subprocess.TimeoutExpired) as exc:  # killed, or slow
            return SessionOutcome("lost", str(exc))
        progress = SpoolProgress({f: run.site_root(config, f) for f in sites})
        outcome = _follow(run, processes, watch, progress, start_s)
        processes.wait("wandb", WANDB_S)
        return outcome


def _supernode(
    run: RunDir, config: Config, facility: str, port: int, reserve: Callable[[], int], site: Path
) -> Child:
    """Return the process of a site of this machine; beside others it shows a key as they do."""
    shared = config.federation.shared_host
    if config.serve.address is None:
        return commands.supernode(facility, port, reserve, site, shared)
    address, key = f"127.0.0.1:{port}", invitations.private_key(run, facility)
    return commands.joined_supernode(facility, address, run.certificate, key, reserve, site, shared)


def public_socket(run: RunDir, config: Config) -> commands.PublicSocket | None:
    """Return where sites of other centres come in, if they may."""
    address = config.serve.address
    if address is None:
        return None
    return commands.PublicSocket(
        listen=config.serve.listen or f":{address.rpartition(':')[2]}",
        certificate=run.certificate,
        certificate_key=run.certificate_key,
        credentials=run.credentials,
        exchange=run.exchange,
        quota_gb=config.exchange.quota_gb,
        events=run.events,
        welcome={"run_key": run.key, "versions": versions()},
    )


def _follow(
    run: RunDir,
    processes: Processes,
    watch: _Watch,
    progress: SpoolProgress,
    start_s: float,
) -> SessionOutcome:
    """Show the run's events until it ends, or one of its processes does."""
    started, disk, attendants = time.monotonic(), DiskWatch(run.path), watch.attendants
    attendants.start()
    slow = SlowStarts({f: run.logs / f"{commands.supernode_name(f)}.log" for f in progress.sites})
    while True:
        gone = processes.tend()
        server = _server_state(run)
        notes = [{"event": "site_note", "facility": f, "note": n} for f, n in attendants.notes()]
        _emit(run, [*slow.poll(), *notes])
        events = watch.follower.poll()  # after the looks above, so that no last word is missed
        watch.view.update([*events, *progress.poll()])
        if news := disk.poll():
            watch.view.print_line(news)
        for event in events:
            if event["event"] == "run_finished":
                return _finished(event, processes)
            if event["event"] == "reply_lost" and event.get("facility"):
                # Its SuperNode may wait for it for ever; started again, it is asked anew.
                processes.restart(commands.supernode_name(str(event["facility"])))
        if attendants.fault:
            return SessionOutcome("failed", attendants.fault, fatal=True)
        if gone:
            return _lost(gone[0], run)
        if server == "dead":
            return SessionOutcome("lost", "the ServerApp died")
        if server == "absent" and time.monotonic() - started > start_s:
            words = f"the ServerApp did not start within {start_s:.0f} s"
            return SessionOutcome("lost", f"{words}:\n{tail(run.logs / 'superlink.log')}")
        time.sleep(POLL_S)


def _emit(run: RunDir, events: Sequence[Event]) -> None:
    """Put what the driver has seen into the run's events."""
    if events:
        with suppress(OSError), EventLog(run.events, join=True) as log:
            for event in events:
                log.emit(**event)


def _finished(event: Event, processes: Processes) -> SessionOutcome:
    """Return what the ServerApp said; it fails when SuperLink dies, which is not its fault."""
    fatal = bool(event.get("fatal"))
    if event["status"] == "failed" and not fatal:
        time.sleep(1.0)
        if gone := processes.tend():
            return SessionOutcome("lost", f"{gone[0].name} ended")
    return SessionOutcome(event["status"], event["error"], fatal, logged=True)


def _lost(child: Child, run: RunDir) -> SessionOutcome:
    log = run.logs / f"{child.name}.log"
    if child.restartable:
        return SessionOutcome("failed", f"{child.name} does not stay up:\n{tail(log)}")
    return SessionOutcome("lost", f"{child.name} ended")


def _server_state(run: RunDir) -> str:
    """Return ``absent`` (not started yet), ``alive`` or ``dead``."""
    server = read_json(run.server_file)
    if server is None:
        return "absent"
    try:
        status = psutil.Process(int(server["pid"])).status()
    except psutil.NoSuchProcess:
        return "dead"
    return "dead" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "alive"


@contextmanager
def signals() -> Iterator[None]:
    """Turn the first signal that asks us to stop into `Interrupted`, and ignore the others.

    Another one must not end the clean-up before that can ignore them itself.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
