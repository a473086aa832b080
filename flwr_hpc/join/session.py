"""A site's session: from what is shown to its person to the end of its last job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import OmegaConf
from rich.console import Console

from flwr_hpc.config.invitation import Invitation, check_versions, versions
from flwr_hpc.config.schema import Config
from flwr_hpc.errors import UserError
from flwr_hpc.files import keep_files_private, private_folder, publish, read_json
from flwr_hpc.flower import commands
from flwr_hpc.flower.processes import Processes, ignore_signals, reserve_port
from flwr_hpc.gate import peers
from flwr_hpc.join import server_door
from flwr_hpc.join.configure import run_part
from flwr_hpc.join.server_watch import ServerWatch
from flwr_hpc.schedulers.accounts import settle_accounts
from flwr_hpc.schedulers.base import SchedulerUnavailableError
from flwr_hpc.schedulers.registry import check_facilities, make_scheduler
from flwr_hpc.server import preflight
from flwr_hpc.server.driver import Interrupted, cancel_jobs, clear_sites, let_jobs_end, signals
from flwr_hpc.server.progress import SpoolProgress
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.sites import Elsewhere, open_sites, site_settings, write_site
from flwr_hpc.site.launcher import job_spec
from flwr_hpc.spool import Spool
from flwr_hpc.tracking.live import LiveView

POLL_S = 0.5
SPENT_S = 600.0  # between two lines on what the site has spent
LEAVE_S = 15.0  # for the server to end once it has heard that the site lets go


def show_plan(invitation: Invitation, config: Config) -> int:
    """Print what comes with the run, what this centre gives, and the job script."""
    _check(invitation, config)
    console = Console()
    folder = _site_dir(invitation, config)
    _show(console, invitation, config, folder)
    console.rule(f"job script of {invitation.site}")
    console.out(_script(folder, invitation, config), highlight=False)
    return 0


def join(invitation: Invitation, config: Config) -> int:
    """Take part in the run until it is over; return the command's exit code."""
    _check(invitation, config)
    keep_files_private()
    console = Console()
    planned = _site_dir(invitation, config)
    if not (planned.path / "run.json").exists():  # else what it has on disk makes room
        for line in preflight.check_space(config, planned.path, joins=True):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    folder = _open(invitation, config)
    with folder.lock():
        _show(console, invitation, config, folder)
        _ask(partial(console.print, soft_wrap=True, highlight=False, markup=False), invitation)
        publish(folder.jobs / f"{invitation.site}.sh", _script(folder, invitation, config))
        with LiveView(console, config.rounds, [invitation.site]) as view:
            code, why = _attend(folder, invitation, config, view)
        console.print(why, soft_wrap=True, highlight=False, markup=False)
        if spent := _spent(folder, config):
            console.print(spent, soft_wrap=True, highlight=False, markup=False)
    return code


def _check(invitation: Invitation, config: Config) -> None:
    """Find what can go wrong before anything starts."""
    peers.check(config.federation.shared_host)
    check_facilities(config.facilities)
    settle_accounts(config.facilities)
    preflight.check_store(config)
    preflight.check_facilities(config, invitation.sites)


def _ask(say: Callable[[str], object], invitation: Invitation) -> None:
    """Ask the server whether the invitation holds and the versions fit; it may be away."""
    try:
        check_versions(server_door.ask(invitation)["versions"])
    except server_door.Away as exc:
        say(f"the server cannot be reached now ({exc}); trying again until it can")


def _site_dir(invitation: Invitation, config: Config) -> RunDir:
    path = Path(config.site.dir or f"sites/{invitation.run_key}-{invitation.site}")
    return RunDir(path.expanduser().absolute())


def _open(invitation: Invitation, config: Config) -> RunDir:
    """Make the site's folder, or take the one of an earlier session."""
    folder = _site_dir(invitation, config)
    known = read_json(folder.path / "run.json")
    mine = {"run_key": invitation.run_key, "site": invitation.site}
    if known is not None and known != mine:
        raise UserError(
            f"site.dir={folder.path} holds another run's site "
            f"({known.get('site')} of {known.get('run_key')}). Name another folder"
        )
    try:
        for path in (folder.path, folder.logs, folder.jobs, folder.flower, folder.invitations):
            private_folder(path)
        publish(folder.path / "run.json", json.dumps(mine))
        publish(folder.path / "versions.json", json.dumps(versions()))
        folder.write_config(config)
        invitation.write(_credential(folder))
        publish(_private_key(folder), invitation.private_key)
        private_folder(folder.certificate.parent)
        publish(folder.certificate, invitation.certificate)
    except OSError as exc:
        raise UserError(f"the site's folder {folder.path} cannot be written: {exc}") from None
    return folder


def _credential(folder: RunDir) -> Path:
    return folder.invitations / "own.json"


def _private_key(folder: RunDir) -> Path:
    return folder.invitations / "own.pem"


def _server(folder: RunDir, invitation: Invitation, config: Config) -> Elsewhere:
    if config.exchange.store:  # a bucket of somebody's, that both sides reach
        return Elsewhere(folder.store_url(config, invitation.run_key), None, invitation.sites)
    return Elsewhere(f"https://{invitation.address}", _credential(folder), invitation.sites)


def _script(folder: RunDir, invitation: Invitation, config: Config) -> str:
    server = _server(folder, invitation, config)
    settings = site_settings(folder, config, invitation.site, invitation.run_key, server)
    return make_scheduler(config.facilities[invitation.site]).script(job_spec(settings))


def _show(console: Console, invitation: Invitation, config: Config, folder: RunDir) -> None:
    """Print what belongs to the run, and what to this centre."""
    own = {
        "facility": _given(config.facilities[invitation.site]),
        "data.paths": config.data.paths.get(invitation.site, []),
        "limits": vars(config.site.limits),
        "folder": str(folder.path),
    }
    for title, part in (
        (f"comes with the run {invitation.run_key}", run_part(invitation)),
        (f"of this centre, as {invitation.site}", own),
    ):
        console.rule(title)
        console.out(OmegaConf.to_yaml(OmegaConf.create(part)), highlight=False)


def _given(facility: object) -> dict[str, object]:
    return {
        key: value
        for key, value in vars(facility).items()
        if value not in (None, [], {}, "")
        and key not in ("queues", "required", "forbidden", "shared_roots")
    }


def _attend(
    folder: RunDir, invitation: Invitation, config: Config, view: LiveView
) -> tuple[int, str]:
    """Keep the site's processes up until the run is over; end its jobs. Return code and reason."""
    code, why = 1, "the site could not be started"
    with signals():
        try:
            code, why = _session(folder, invitation, config, view)
        except Interrupted as exc:
            code, why = 128 + exc.number, f"stopped by {exc}; to go on, type the same again"
        except UserError as exc:
            code, why = 1, f"error: {exc}"
        finally:
            with ignore_signals():
                if code == 0:
                    with suppress(SchedulerUnavailableError, OSError):
                        let_jobs_end(folder, config)
                if left := cancel_jobs(folder, config):
                    view.print_line(f"could not cancel every job; look for them yourself: {left}")
                elif code == 0:
                    clear_sites(folder, config)
    return code, why


def _session(
    folder: RunDir, invitation: Invitation, config: Config, view: LiveView
) -> tuple[int, str]:
    """Start the site, and return when the run is over."""
    name, shared = invitation.site, config.federation.shared_host
    settings = write_site(folder, config, name, _server(folder, invitation, config))
    spool = Spool(folder.site_root(config, name))
    with ExitStack() as stack:

        def reserve() -> int:
            return stack.enter_context(reserve_port())

        spool.released.unlink(missing_ok=True)
        spool.left_out.remove()
        temporary = TemporaryDirectory(prefix="flwr-hpc-", ignore_cleanup_errors=True)
        own = stack.enter_context(temporary)
        processes = stack.enter_context(
            Processes(
                folder.logs, commands.environment(folder.flower), folder.lock_fd(), view.print_line
            )
        )
        processes.start(commands.fork_server(folder.flower, Path(own)))
        processes.start(
            commands.joined_supernode(
                name, invitation.address, folder.certificate, _private_key(folder), reserve,
                settings, shared,
            )
        )  # fmt: skip
        progress = SpoolProgress({name: spool.root})
        watch = ServerWatch(
            partial(server_door.ask, invitation),
            partial(_at_rest, folder, config),
            view.print_line,
        )
        _follow(processes, spool, watch, view, progress, lambda: _spent(folder, config))
        _take_leave(invitation)
    return 0, "the run is over"


def _follow(
    processes: Processes,
    spool: Spool,
    watch: ServerWatch,
    view: LiveView,
    progress: SpoolProgress,
    spent: Callable[[], str],
) -> None:
    """Show what the site does until the server says that the run is over."""
    told, restarts, reason = time.monotonic(), 0, ""
    while not spool.released.exists():
        if gone := processes.tend():
            raise UserError(f"{gone[0].name} has ended: see its log in {processes.logs}")
        view.update(progress.poll())
        if time.monotonic() - told > SPENT_S:
            told = time.monotonic()
            view.print_line(spent())
        if (left_out := spool.left_out.read()) and left_out.reason != reason:
            reason = left_out.reason
            view.print_line(f"the run goes on without this site: {reason}")
        watch.poll(in_doubt=processes.restarts > restarts)
        restarts = processes.restarts
        time.sleep(POLL_S)


def _take_leave(invitation: Invitation) -> None:
    """Let the site's last answer reach the server, which waits for it and then ends."""
    deadline = time.monotonic() + LEAVE_S
    while time.monotonic() < deadline:
        try:
            server_door.ask(invitation)
        except (server_door.Away, UserError):
            return
        time.sleep(POLL_S)


def _at_rest(folder: RunDir, config: Config) -> str:
    """Say what the site's jobs have cost once none is left of them."""
    (site,) = open_sites(folder, config).values()
    try:
        over = site.spool.allocations() and not site.live_jobs()
        return _spent(folder, config) if over else ""
    except (SchedulerUnavailableError, OSError):
        return ""


def _spent(folder: RunDir, config: Config) -> str:
    """Say what the site's jobs have cost."""
    (site,) = open_sites(folder, config).values()
    (facility,) = config.facilities.values()
    try:
        status = site.costs()
    except (SchedulerUnavailableError, OSError):
        return ""
    ran_s = sum(
        sum(s for k, s in ledger.items() if k != "queue") for ledger in status.ledger.values()
    )
    hours = ran_s * facility.nodes / 3600
    limit = config.site.limits.node_hours
    most = "" if limit is None else f" of {limit:g}"
    return f"{len(status.ledger)} jobs, {hours:.2f}{most} node-hours"
