"""What `flwr_hpc.run` does with a checked configuration: plan it, or run it to the end."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import Config
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.codec import Codec, make_codec, make_downlink
from flwr_hpc.files import keep_files_private, publish, read_json
from flwr_hpc.gate.credentials import read_credentials
from flwr_hpc.schedulers.accounts import Account
from flwr_hpc.schedulers.registry import make_scheduler
from flwr_hpc.server import invitations, preflight
from flwr_hpc.server.driver import SessionOutcome, drive
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.sites import site_settings
from flwr_hpc.site.launcher import job_spec
from flwr_hpc.ssh.attendant import Attendant, Attendants, remote_sites
from flwr_hpc.ssh.host import SshLostError
from flwr_hpc.tracking.live import LiveView
from flwr_hpc.tracking.report.page import rebuild
from flwr_hpc.tracking.text import node_hours_line


def show_plan(config: Config, accounts: Mapping[str, Account]) -> int:
    """Print the plan and the job scripts; start nothing and write nothing."""
    preflight.check(config)
    console = Console()
    console.print(_plan(config))
    for line in filter(None, (_traffic(config), _disk(config))):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    _print_accounts(console, config, accounts)
    planned = RunDir(Path(config.resume or config.run_dir or "runs/DATE_TIME").absolute())
    run_key = planned.key if config.resume else "RUN"
    for name in config.here:
        console.rule(f"job script of {name}")
        console.out(_script(planned, config, name, run_key), highlight=False)
    return 0


def run(config: Config, resumed: bool, accounts: Mapping[str, Account]) -> int:
    """Run the federation and return the command's exit code."""
    preflight.check(config)
    keep_files_private()
    invitations.serve_by_ssh(config)
    console = _Console()
    if not resumed:  # else what it has on disk makes room as it goes on
        for line in preflight.check_space(config, Path(config.run_dir or "runs").absolute()):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    run_dir = RunDir.open(str(config.resume)) if resumed else RunDir.create(config)
    with run_dir.lock():
        if resumed and _is_complete(run_dir, config):
            more = f"rounds={2 * config.rounds}"
            console.print(f"finished already after {config.rounds} rounds; to go on, add {more}")
            return _conclude(console, run_dir, SessionOutcome("finished"))
        if resumed:
            run_dir.write_config(config)
        for name in config.here:
            script = _script(run_dir, config, name, run_dir.key)
            publish(run_dir.jobs / f"{name}.sh", script)
        console.print(f"run directory: {run_dir.path}", soft_wrap=True)
        if config.serve.address:
            new = invitations.prepare(run_dir, config)
            if not config.facilities:
                _print_invitations(console, run_dir, new if resumed else [])
        _print_accounts(console, config, accounts)
        attendants = connect(console, run_dir, config, resumed)
        with LiveView(console, config.rounds, run_dir.sites(config)) as view:
            outcome = drive(run_dir, config, view, attendants)
        try:
            if spent := node_hours_line(rebuild(run_dir.path)):
                console.print(spent, soft_wrap=True, highlight=False, markup=False)
        except (OSError, UserError) as exc:
            console.print(f"the report could not be written: {exc}", markup=False)
    return _conclude(console, run_dir, outcome)


def connect(console: Console, run_dir: RunDir, config: Config, resumed: bool) -> Attendants:
    """Open the lines to other hosts; a run that is resumed goes on without one that is down."""
    sites = remote_sites(config, run_dir.key, run_dir.invitations, run_dir.ssh)
    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.host.close)
            try:
                site.host.open(ask=True)
                line = f"{site.name}: on {site.check().host}, by ssh {site.host.name}"
            except SshLostError as exc:
                if not resumed:
                    raise UserError(f"{site.name}: {exc}") from None
                line = f"{site.name}: {exc}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        stack.pop_all()
    end = f"python -m flwr_hpc.run end={shlex.quote(str(run_dir.path))}"
    port = int(str(config.serve.listen).rpartition(":")[2]) if sites else 0
    logs = {site.name: run_dir.logs / f"site-{site.name}.log" for site in sites}
    return Attendants([Attendant(site, logs[site.name], end) for site in sites], port)


class _Console(Console):
    """A console that falls silent when nobody reads it any more; the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def _conclude(console: Console, run_dir: RunDir, outcome: SessionOutcome) -> int:
    """Say how it ended and what to type next."""
    path = shlex.quote(str(_short(run_dir.path)))
    lines = [f"report: {_short(run_dir.report)}"]
    if outcome.status == "finished":
        model = repr(str(_short(run_dir.model)))
        lines += _left_out(run_dir)
        lines.append(
            f"finished: {path}   load the model with {_loader(run_dir)}.from_pretrained({model})"
        )
        code = 0
    elif outcome.fatal:
        lines = [f"error: {outcome.error}"]
        code = 2
    else:
        see = f"   (see {_short(run_dir.logs / 'server_app.log')})" * (not outcome.signal)
        lines.append(f"{outcome.status}: {outcome.error}{see}")
        command = "run" if run_dir.config().facilities else "serve"
        lines.append(f"continue with: python -m flwr_hpc.{command} resume={path}")
        code = 128 + outcome.signal if outcome.signal else 1
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return code


def _is_complete(run_dir: RunDir, config: Config) -> bool:
    summary = read_json(run_dir.summary) or {}
    return summary.get("status") == "finished" and summary.get("versions", 0) >= config.rounds


def _left_out(run_dir: RunDir) -> list[str]:
    """Return who had no part in a run that has finished, and why."""
    facilities = (read_json(run_dir.summary) or {}).get("facilities", {})
    reasons = {name: f["excluded"] for name, f in facilities.items() if f.get("excluded")}
    return [f"without {name}: {reason}" for name, reason in sorted(reasons.items())]


def _loader(run_dir: RunDir) -> str:
    """Return which class of transformers or peft loads the trained model."""
    adapter = read_json(run_dir.model / "adapter_config.json")
    config = read_json(run_dir.model / "config.json") or {}
    task = adapter["task_type"] if adapter else ""
    pairs = task == "SEQ_2_SEQ_LM" or config.get("is_encoder_decoder")
    return f"Auto{'Peft' * bool(adapter)}ModelFor{'Seq2SeqLM' if pairs else 'CausalLM'}"


def _short(path: Path) -> Path:
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path


def _script(run_dir: RunDir, config: Config, facility: str, run_key: str) -> str:
    spec = job_spec(site_settings(run_dir, config, facility, run_key))
    return make_scheduler(config.facilities[facility]).script(spec)


def _plan(config: Config) -> Table:
    table = Table(title=f"{config.rounds} rounds of {config.strategy['_target_']}")
    for column in ("facility", "scheduler", "allocation", "walltime", "steps per order", "data"):
        table.add_column(column)
    for name, facility in config.facilities.items():
        table.add_row(
            name,
            facility.scheduler + (f", by ssh {facility.ssh}" if facility.ssh else ""),
            _shape(facility),
            facility.walltime,
            str(config.train.steps),
            f"{config.data.kind} {' '.join(config.data.paths.get(name, []))}".strip(),
        )
    return table


def _traffic(config: Config) -> str:
    """Say what an order sends between server and site, where the model's shape is known."""
    exchange, codec = config.exchange, make_codec(config.exchange.codec)
    parameters = preflight.sent_parameters(config)
    if parameters is None or codec.payload_gb(parameters) is None:
        return ""
    whole = 4e-9 * parameters
    downlink = make_downlink(exchange.downlink, codec)
    what = "adapter" if config.model.lora.r else "weights"
    return (
        f"{what}: {parameters / 1e9:.3g} B parameters, {whole:.3g} GB in float32. An order brings "
        f"{_sent(downlink, parameters)} to a site (exchange.downlink={_named(exchange.downlink)}) "
        f"and {_sent(codec, parameters)} back (exchange.codec={_named(exchange.codec)})"
    )


def _sent(codec: Codec | None, parameters: int) -> str:
    """Say how much so many values become; all of them without a codec that knows."""
    size = codec and codec.payload_gb(parameters)
    most = "at most " if codec and size and codec.varies else ""
    return f"{most}{size or 4e-9 * parameters:.3g} GB"


def _disk(config: Config) -> str:
    """Say what the run keeps on disk, where the model's shape is known."""
    if (parameters := preflight.trained_parameters(config)) is None:
        return ""
    site, gb = preflight.site_disk_of(config, parameters), preflight.gb
    server = preflight.server_disk_of(config, parameters)
    parts = f"checkpoints {gb(site.checkpoints)}, weights {gb(site.trained + site.received)}"
    parts += f", error feedback {gb(site.feedback)}" * bool(site.feedback)
    return (
        f"disk: at most {gb(site.total)} at each site ({parts}; prepared data beside it) and "
        f"{gb(server)} in the run directory. Of the server's memory "
        f"weights take {config.exchange.memory_gb:g} GB at most (exchange.memory_gb)"
    )


def _named(codec: object) -> str:
    return f"[{','.join(map(str, codec))}]" if isinstance(codec, list) else str(codec)


def _print_invitations(console: Console, run_dir: RunDir, renewed: Sequence[Path]) -> None:
    """Say what each site's person is to get, and to type."""
    if renewed:
        line = (
            "the run's settings have changed, and with them the invitations of "
            f"{', '.join(path.stem for path in renewed)}: the former are worth nothing"
        )
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    wheel = invitations.put_wheel(run_dir)
    for site, credential in read_credentials(run_dir.credentials).items():
        path = run_dir.invitations / f"{site}.json"
        if not credential.revoked:
            line = f"{site}: give {path} to its person alone, who types:"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            line = f"  python -m flwr_hpc.join {site}.json +facility=NAME data.paths=/PATH/TO/FILES"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    line = f"who has no flwr-hpc, or another, gets {wheel}, too: python -m pip install {wheel.name}"
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _print_accounts(console: Console, config: Config, accounts: Mapping[str, Account]) -> None:
    for name, account in accounts.items():
        if not config.facilities[name].local:
            line = f"{name}: account {account}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def _shape(f: FacilityConfig) -> str:
    gpus = f", {f.gpus_per_node} GPUs/node" if f.gpus_per_node else ""
    nodes = "node" if f.nodes == 1 else "nodes"
    return f"{f.nodes} {nodes} x {f.ranks_per_node} ranks{gpus}"
