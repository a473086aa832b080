"""The configuration of a simulation, validated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.config.schema import explain
from flwr_hpc.errors import UserError, not_negative, one_of, positive

QUEUES = ("none", "lognormal", "history", "trace", "replay", "cluster")
LEARNING = ("network", "text", "surrogate")


@dataclass
class QueueModel:
    """How long a site's jobs wait."""

    # ``none``; ``lognormal`` (`median_s`, `sigma`, `memory_s`, `regimes`); ``history`` (the
    # waits that runs at the facility of the site's name have kept); ``trace`` (of `trace`, a
    # Standard Workload Format file, from a random time on); ``replay`` (`waits_s`, one after the
    # other); ``cluster`` (other users' jobs on `cluster_nodes` nodes with backfill).
    kind: str = "lognormal"
    # A site waits for its first job and never again: what a perfect forecast could come to.
    first_wait_only: bool = False
    median_s: float = 1800.0  # Of lognormal waits
    sigma: float = 1.0
    memory_s: float = 21600.0  # How long waits stay alike: the decay time of their autocorrelation
    regimes: list[list[Any]] = field(default_factory=list)  # Other medians from given times on
    trace: str | None = None
    time_scale: float = 1.0  # Simulated seconds of a second of the trace
    waits_s: list[float] = field(default_factory=list)
    # Of the small cluster: its size, the other users' offered load as a share of it, and
    # their jobs.
    cluster_nodes: int = 16
    load: float = 0.9
    mean_nodes: float = 2.0
    mean_runtime_s: float = 3600.0


@dataclass
class SiteModel:
    """A simulated site; times in seconds unless said otherwise."""

    step_s: float = 2.0  # Of one optimizer step
    nodes: int = 1  # Of an allocation, for node-hours
    walltime: str = "02:00:00"  # Of an allocation
    startup_s: float = 60.0  # From the job's start to the loaded model
    write_s: float = 10.0  # To write results
    # Kept back at the end of the walltime where that is more than `write_s`: of one
    # allocation after the other, then from the first again.
    reserves_s: list[float] = field(default_factory=list)
    # What the launcher expects, ahead of its submission, that an allocation will wait: of one
    # after the other; of those beyond the list, and by default, the median of the last waits.
    forecasts_s: list[float] = field(default_factory=list)
    transfer_s: float = 20.0  # Weights one way; a message one way
    latency_s: float = 2.0
    message_s: float = 0.0  # Until the site acts on a message: Flower starts a process for each
    # While a job runs: put back in the queue with its progress saved; lost with the progress
    # of the running order.
    preemptions_per_hour: float = 0.0
    failures_per_hour: float = 0.0
    outages: list[list[Any]] = field(default_factory=list)  # The whole site is down
    joins_s: float = 0.0  # When the site comes and goes
    leaves_s: float | None = None
    queue: QueueModel = field(default_factory=QueueModel)


@dataclass
class ScenarioConfig:
    """Sites and what they learn."""

    sites: dict[str, SiteModel] = field(default_factory=dict)
    # Held-out loss, nats per token, that counts as reached; null: what suits the learning task.
    target: float | None = None
    horizon_h: float = 240.0  # Simulated hours after which a run is given up
    own_share: float = 0.85  # Share of a site's data that is its own domain's: 1 is the most skewed


@dataclass
class SimulateConfig:
    """One comparison."""

    scenario: ScenarioConfig = field(default_factory=ScenarioConfig)
    # What ``'strategy=[...]'`` has chosen: ``_target_`` and arguments of each.
    strategies: dict[str, dict[str, Any]] = field(default_factory=dict)
    # With ``'+facility=[...]'`` the sites are these, with the scenario's queues.
    facilities: dict[str, FacilityConfig] = field(default_factory=dict)
    # ``warm``, ``per_round``, or ``own``: as each strategy's file says, else warm.
    policy: str = "own"
    steps: int = 100  # Inner steps per order, where a strategy does not decide
    seeds: int = 3  # Runs of each strategy, with seeds 0, 1,
    # What the sites learn: ``network`` (on tables of probabilities) and ``text`` (a transformer)
    # are really trained, ``surrogate`` is a formula.
    learning: str = "network"
    evaluate_every_s: float = 60.0  # The held-out loss is computed no more often than this
    out: str | None = None  # Folder of the results; default: simulations/<date>_<time>


def parse(raw: DictConfig | dict[str, Any]) -> SimulateConfig:
    """Turn a composed configuration into a checked `SimulateConfig`."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SimulateConfig), raw))
    except OmegaConfBaseException as exc:
        raise UserError(explain(exc)) from None
    assert isinstance(config, SimulateConfig)
    one_of("policy", config.policy, ("own", "warm", "per_round"))
    one_of("learning", config.learning, LEARNING)
    for key in ("steps", "seeds"):
        positive(key, getattr(config, key))
    not_negative("evaluate_every_s", config.evaluate_every_s)
    if config.scenario.target is not None:
        positive("scenario.target", config.scenario.target)
    positive("scenario.horizon_h", config.scenario.horizon_h)
    for name, site in config.scenario.sites.items():
        check_site(f"scenario.sites.{name}", site)
    if not config.scenario.sites and not config.facilities:
        raise UserError("a scenario needs sites. Name one that has some: scenario=congested")
    return config


def check_site(key: str, site: SiteModel) -> None:
    """Refuse a site that makes no sense; `key` says where it is configured."""
    positive(f"{key}.step_s", site.step_s)
    positive(f"{key}.nodes", site.nodes)
    kept_s = max([site.write_s, *site.reserves_s])
    if walltime_s(site.walltime) <= site.startup_s + kept_s + site.step_s:
        raise UserError(
            f"{key}.walltime={site.walltime} leaves no time to train after startup_s="
            f"{site.startup_s:g} and {kept_s:g} s kept for writing (write_s, reserves_s). "
            f"Example: {key}.walltime=02:00:00"
        )
    for name in ("startup_s", "write_s", "transfer_s", "latency_s", "message_s", "joins_s"):
        not_negative(f"{key}.{name}", getattr(site, name))
    for name in ("reserves_s", "forecasts_s"):
        for value in getattr(site, name):
            not_negative(f"{key}.{name}", value)
    for name in ("preemptions_per_hour", "failures_per_hour"):
        not_negative(f"{key}.{name}", getattr(site, name))
    for pair in site.outages:
        if not _numbers(pair) or not 0 <= pair[0] < pair[1]:
            raise UserError(
                f"{key}.outages takes pairs [from_s, to_s]; found {pair}. "
                f"Example: '{key}.outages=[[3600,7200]]'"
            )
    _check_queue(f"{key}.queue", site.queue, site.nodes)


def _check_queue(key: str, queue: QueueModel, nodes: int) -> None:
    one_of(f"{key}.kind", queue.kind, QUEUES)
    for f in fields(QueueModel):
        value = getattr(queue, f.name)
        if isinstance(value, float | int) and not isinstance(value, bool):
            check = not_negative if f.name in ("memory_s", "sigma") else positive
            check(f"{key}.{f.name}", value)
    for pair in queue.regimes:
        if not _numbers(pair) or min(pair) < 0:
            raise UserError(
                f"{key}.regimes takes pairs [from_s, median_s]; found {pair}. "
                f"Example: '{key}.regimes=[[18000,7200]]'"
            )
    if queue.kind == "trace" and not queue.trace:
        raise UserError(f"{key}.trace must name a file: {key}.trace=FILE.swf")
    if queue.kind == "replay" and not (queue.waits_s and min(queue.waits_s) >= 0):
        raise UserError(
            f"{key}.waits_s takes waits in seconds; found {queue.waits_s}. "
            f"Example: '{key}.waits_s=[60,900]'"
        )
    if queue.mean_nodes < 1:
        raise UserError(f"{key}.mean_nodes={queue.mean_nodes:g} must be at least 1")
    if queue.kind == "cluster" and nodes > queue.cluster_nodes:
        raise UserError(
            f"{key}.cluster_nodes={queue.cluster_nodes} is too small for a job of {nodes} nodes"
        )


def _numbers(pair: list[Any]) -> bool:
    return len(pair) == 2 and all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in pair
    )
