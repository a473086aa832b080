"""The ServerApp: a strategy over the exchange grid, from the newest checkpoint to the model."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Set
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import unquote

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.config.schema import Config
from flwr_hpc.config.server_memory import ServerMemory
from flwr_hpc.exchange.checkpoint import FileCheckpoints
from flwr_hpc.exchange.codec import make_codec, make_downlink
from flwr_hpc.exchange.executors import DaemonThreads
from flwr_hpc.exchange.grid import ExchangeGrid
from flwr_hpc.exchange.store import make_store
from flwr_hpc.files import (
    explain_disk_trouble,
    is_disk_trouble,
    open_many_files,
    publish,
    wait_until_writable,
)
from flwr_hpc.gate.credentials import Guests, read_credentials
from flwr_hpc.server.model_dir import (
    base_options,
    publish_files,
    set_factors_apart,
    write_model,
)
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.site_signs import SiteSigns, SuperNodeStarts
from flwr_hpc.server.strategy_factory import build_strategy
from flwr_hpc.tracking.events import EventLog
from strategies import limit_memory
from strategies.base.hpc_strategy import HpcStrategy
from strategies.base.start import run_strategy
from strategies.engine.engine import Engine, global_name
from strategies.engine.runtime import FatalSiteError, RunFailed, Runtime, Settings

SITES_S = 600.0  # for all sites to come up
LAST_S = 180.0  # for those that have joined to hear that the run is over
HERE_S, AWAY_S = 600.0, 86400.0  # for sites of this machine, and of others, to come back

app = ServerApp()
log = logging.getLogger("flwr_hpc")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run directory describes."""
    run = RunDir(Path(unquote(str(context.run_config["run-dir"]))))
    _log_to(run.logs / "server_app.log")
    publish(run.server_file, json.dumps({"pid": os.getpid()}))
    with EventLog(run.events) as events:
        try:
            _once_writable(
                run, events, SystemClock(), lambda: train(run, run.config(), grid, events)
            )
        except RunFailed as exc:
            log.error("%s", exc)
            fatal = isinstance(exc, FatalSiteError)
            events.emit("run_finished", status="failed", error=str(exc), fatal=fatal)
        # What else ends this process, as Flower's signals when its SuperLink does not know it any
        # more, is no end of the run: it is started again.
        except Exception as exc:
            log.exception("the run failed")
            events.emit("run_finished", status="failed", error=f"{type(exc).__name__}: {exc}")
            raise
        else:
            events.emit("run_finished", status="finished", error="")


def _once_writable(run: RunDir, events: EventLog, clock: Clock, work: Callable[[], None]) -> None:
    """Train; when the disk fails wait for it, and go on from the newest checkpoint."""
    while True:
        try:
            return work()
        except OSError as exc:
            if not is_disk_trouble(exc):
                raise
            reason = explain_disk_trouble(exc, run.path)
        events.emit("disk_trouble", reason=reason)
        log.error("%s", reason)
        wait_until_writable(run.path, clock.sleep)


def train(run: RunDir, config: Config, grid: Grid, events: EventLog) -> None:
    """Train from the newest checkpoint, or from the start, to the last round."""
    open_many_files()  # of each reply in shards all are open
    store = make_store(run.store_url(config))
    store.sweep()
    memory = ServerMemory.of(config.exchange.memory_gb)
    limit_memory(memory.blocks)
    codec = make_codec(config.exchange.codec)
    exchange = ExchangeGrid(
        grid,
        store,
        codec,
        run.flower / "replies",
        downlink=make_downlink(config.exchange.downlink, codec),
        inline_below_mb=config.exchange.inline_below_mb,
        stall_s=config.exchange.stall_s,
        emit=events.emit,
        memory=memory.checks,
        executor=DaemonThreads(),
    )
    try:
        checkpoints = FileCheckpoints(run.checkpoints, memory.waiting)
        _train(run, config, exchange, checkpoints, events)
        exchange.close()
    finally:
        exchange.stop()


def _train(
    run: RunDir,
    config: Config,
    exchange: ExchangeGrid,
    checkpoints: FileCheckpoints,
    events: EventLog,
) -> None:
    clock = SystemClock()
    runtime = Runtime(
        clock=clock,
        emit=events.emit,
        checkpoints=checkpoints,
        run_key=run.key,
        settings=engine_settings(config),
        check=None,  # the exchange checks replies
        lost=_signs(run, config, clock).lost,
        restarted=_restarted(run, config),
        may_speak_for=lambda node_id, site: may_speak_for(run, config, node_id, site),
        revoked=revoked(run),
    )
    strategy = build_strategy(config.strategy)
    engine = Engine(exchange, runtime)
    state = checkpoints.restore()
    events.emit(
        "run_started",
        run_key=run.key,
        strategy=config.strategy["_target_"],
        rounds=config.rounds,
        facilities=run.sites(config),
        resumed=state is not None,
        version=(state or {}).get("version", 0),
    )
    _wait_for_sites(engine, run, config, (state or {}).get("version", 0) >= config.rounds)
    initial = _initial(run, engine, checkpoints, config.model.lora.freeze_a)
    runtime.options.update(base_options(run.model))
    exchange.expect(initial)
    final = _start(strategy, exchange, initial, config, runtime, engine)
    write_model(
        run.model,
        final,
        run.frozen_factors if config.model.lora.freeze_a else None,
        int(config.model.max_shard_gb * 1e9),
        getattr(strategy, "residual", None),
    )
    engine.release()


def _signs(run: RunDir, config: Config, clock: Clock) -> SiteSigns:
    return SiteSigns({name: run.site_root(config, name) for name in config.here}, clock)


def _restarted(run: RunDir, config: Config) -> Callable[[], Set[int]]:
    """Return what tells of SuperNodes that began anew: one without a key of its own is new then."""
    if not config.serve.address:
        return frozenset
    return SuperNodeStarts(run.events, run.credentials).nodes


def may_speak_for(run: RunDir, config: Config, node_id: int, site: str) -> bool:
    """Tell whether a node is that of a site: of this host all are ours, others have keys."""
    if not config.serve.address:
        return True
    credential = read_credentials(run.credentials).get(site)
    return credential is not None and not credential.revoked and credential.node_id == node_id


def revoked(run: RunDir) -> Callable[[], Mapping[str, str]]:
    """Return what tells which sites were let in and are out again, and why."""
    guests = Guests(run.credentials)
    words = "it was revoked; `python -m flwr_hpc.serve invite {0} {1}` lets it in again"
    return lambda: {site: words.format(site, run.path) for site in guests.revoked()}


def _wait_for_sites(engine: Engine, run: RunDir, config: Config, over: bool) -> None:
    """Wait until every facility's site has answered; for those that join, as long as it takes.

    When the training is `over`, and this server was killed in its last moments, sites may know
    already and be gone: it goes on with those that come back within minutes, to tell them.
    """
    joined = config.serve.address is not None
    patience_s = SITES_S if not joined else LAST_S if over else math.inf
    deadline = engine.now() + patience_s
    while True:
        facilities = run.sites(config)  # some may be invited, or revoked, meanwhile
        try:
            engine.wait_for(facilities, timeout=5.0)
        except RunFailed as exc:
            strangers = sorted(set(engine.sites) - set(facilities))
            if strangers:
                raise RunFailed("the ClientApp of a site fails: see logs/supernode-*.log") from None
            if engine.now() > deadline:
                if joined:
                    return
                raise RunFailed(f"{exc} (waited {patience_s:.0f} s)") from None
        else:
            return


def _start(
    strategy: Strategy,
    grid: Grid,
    initial: ArrayRecord,
    config: Config,
    runtime: Runtime,
    engine: Engine,
) -> ArrayRecord:
    """Hand over to the strategy and return the final weights."""
    train_config = ConfigRecord({"steps": config.train.steps})
    if isinstance(strategy, HpcStrategy):
        strategy.runtime, strategy.engine = runtime, engine
        result = strategy.start(grid, initial, config.rounds, train_config=train_config)
    elif type(strategy).start is not Strategy.start:  # a loop of its own
        result = strategy.start(grid, initial, config.rounds, train_config=train_config)
    else:
        result = run_strategy(
            strategy,
            grid,
            initial,
            config.rounds,
            train_config=train_config,
            runtime=runtime,
            engine=engine,
        )
    return result.arrays if result.arrays else initial


def _initial(
    run: RunDir, engine: Engine, checkpoints: FileCheckpoints, freeze_a: bool
) -> ArrayRecord:
    """Return the weights to start from: those of the checkpoint, or new ones made by a site."""
    if engine.restored is not None:
        return checkpoints.get(global_name(int(engine.restored["version"])))
    arrays, files = engine.initialize()
    publish_files(run.model, files)
    return set_factors_apart(run.frozen_factors, arrays) if freeze_a else arrays


def engine_settings(config: Config) -> Settings:
    """Return what the engine is to be patient with: each of its settings is a key of ours."""
    found = Settings(**{f.name: getattr(config.federation, f.name) for f in fields(Settings)})
    if config.federation.offline_grace_s is None:
        return replace(found, offline_grace_s=AWAY_S if config.serve.address else HERE_S)
    return found


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("flwr_hpc", "strategies", "flwr"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
