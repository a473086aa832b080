"""One run in virtual time: a scenario's sites under a strategy."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord

from flwr_hpc.config.facility import walltime_s
from flwr_hpc.server.strategy_factory import build_strategy
from flwr_hpc.simulate.clock import HorizonReached, VirtualClock
from flwr_hpc.simulate.config import ScenarioConfig, SiteModel
from flwr_hpc.simulate.facility import Facility, Segment
from flwr_hpc.simulate.grid import SimulatedGrid
from flwr_hpc.simulate.learning.base import Learner
from flwr_hpc.simulate.learning.tasks import TASKS
from flwr_hpc.simulate.queues.build import build_queue
from flwr_hpc.simulate.site import SimulatedSite
from strategies.base.hpc_strategy import HpcStrategy
from strategies.base.start import run_strategy
from strategies.engine.engine import Engine
from strategies.engine.runtime import RunFailed, Runtime, Settings

ENDLESS = 10**9
WAIT_S = 3600.0  # of a long poll
POLL_S = 5.0


@dataclass
class RunOutcome:
    """What a run came to."""

    strategy: str  # Of the run
    seed: int
    policy: str
    # The global model's held-out loss, oldest first.
    curve: list[tuple[float, float, float]] = field(default_factory=list)
    reached: bool = False  # Whether the target was
    hours: float = 0.0  # At the end: when the target was reached, or the run was given up
    node_hours: float = 0.0
    versions: int = 0
    orders: int = 0
    target: float = 0.0  # The held-out loss to reach
    error: str = ""  # Why the run ended early, if it did
    # By site: what its allocations did, for timelines.
    segments: dict[str, list[Segment]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the segments, as JSON."""
        plain = asdict(self)
        del plain["segments"]
        return plain


@dataclass(frozen=True)
class RunSettings:
    """What a run is made with, beside its scenario and strategy."""

    policy: str = "warm"  # Or ``per_round``
    # Of a warm allocation that may wait in the queue at a time; 0: none is submitted ahead
    max_successors: int = 0
    # An order that the walltime ends returns what it has; else it goes on in the next allocation
    partial_work: bool = True
    back_off: bool = True  # Asynchronous strategies leave a site that fails alone for a while
    seed: int = 0  # Of queues, faults, data and initial weights; it decides the whole run
    steps: int = 100  # Per order, where the strategy does not decide
    learning: str = "network"  # Of `learning.tasks.TASKS`
    evaluate_every_s: float = 60.0  # The loss is computed no more often, in virtual seconds
    versions: int = ENDLESS
    wait_s: float = WAIT_S  # Of a long poll
    poll_s: float = POLL_S  # Of the server's loop
    initialize: bool = False  # The initial weights are an order, at the site that is ready first


class _Reached(Exception):
    """The target loss is reached."""


class _Memory:
    """A checkpoint store that keeps what is needed."""

    def __init__(self) -> None:
        self._records: dict[str, ArrayRecord] = {}

    def put(self, name: str, tensors: Iterable[tuple[str, Any]]) -> ArrayRecord:
        record = ArrayRecord({key: Array(np.asarray(tensor)) for key, tensor in tensors})
        self._records[name] = record
        return record

    def get(self, name: str) -> ArrayRecord:
        return self._records[name]

    def commit(self, state: dict[str, Any]) -> None:
        self._records = {name: self._records[name] for name in state["tensors"]}

    def restore(self) -> dict[str, Any] | None:
        return None


class _Watch:
    """Follows the loss of the global model."""

    def __init__(
        self,
        clock: VirtualClock,
        learner: Learner,
        sites: list[SimulatedSite],
        every_s: float,
        target: float,
    ) -> None:
        self.clock, self.learner, self.sites, self.every_s = clock, learner, sites, every_s
        self.target = target
        self.curve: list[tuple[float, float, float]] = []
        self.versions = 0
        self._next = 0.0

    def look(self, version: int, record: ArrayRecord) -> None:
        """Evaluate what a strategy publishes; its `evaluate_fn`."""
        self.versions = version
        now = self.clock.now()
        if now < self._next:
            return
        self._next = now + self.every_s
        loss = self.learner.evaluate({k: a.numpy() for k, a in record.items()})
        node_hours = sum(site.node_hours() for site in self.sites)
        self.curve.append((now / 3600.0, node_hours, loss))
        if loss <= self.target:
            raise _Reached


def simulate(
    scenario: ScenarioConfig,
    name: str,
    strategy: dict[str, Any],
    settings: RunSettings,
) -> RunOutcome:
    """Run a strategy until the target loss, the horizon, or so many versions.

    Parameters
    ----------
    scenario : ScenarioConfig
    name : str
        The strategy's, for the outcome.
    strategy : dict
        ``_target_`` and arguments.
    settings : RunSettings
    """
    clock = VirtualClock(scenario.horizon_h * 3600.0)
    learner = TASKS[settings.learning](len(scenario.sites), scenario.own_share, settings.seed)
    grid, sites = _sites(scenario, settings, clock, learner)
    target = learner.target if scenario.target is None else scenario.target
    watch = _Watch(clock, learner, sites, settings.evaluate_every_s, target)
    outcome = RunOutcome(name, settings.seed, settings.policy, target=target)
    try:
        built = build_strategy(copy.deepcopy(strategy), f"strategies.{name}")
        _start(built, grid, watch, settings)
    except _Reached:
        outcome.reached = True
    except (HorizonReached, RunFailed) as exc:
        outcome.error = str(exc)
    outcome.curve = watch.curve
    outcome.hours = clock.now() / 3600.0
    outcome.node_hours = sum(site.node_hours() for site in sites)
    outcome.versions = watch.versions
    outcome.orders = sum(site.pool.orders for site in sites)
    outcome.segments = {site.name: site.pool.segments for site in sites}
    return outcome


def _runtime(clock: VirtualClock, settings: RunSettings) -> Runtime:
    engine = Settings(
        wait_s=settings.wait_s, evaluate_every=0, final_evaluation_s=0.0, poll_s=settings.poll_s
    )
    if not settings.back_off:
        engine = replace(engine, backoff_s=0.0)
    return Runtime(clock=clock, checkpoints=_Memory(), settings=engine, check=None)


def _start(strategy: Any, grid: SimulatedGrid, watch: _Watch, settings: RunSettings) -> None:
    runtime = _runtime(watch.clock, settings)
    config = ConfigRecord({"steps": settings.steps})
    engine = Engine(grid, runtime)
    if settings.initialize:  # as the server application does
        engine.wait_for(len(grid.get_node_ids()))
        initial, _ = engine.initialize()
    else:
        engine.wait_for(1)
        initial = ArrayRecord({k: Array(np.asarray(w)) for k, w in watch.learner.initial().items()})
    if isinstance(strategy, HpcStrategy):
        strategy.runtime, strategy.engine = runtime, engine
        strategy.start(
            grid, initial, settings.versions, train_config=config, evaluate_fn=watch.look
        )
    else:
        run_strategy(
            strategy,
            grid,
            initial,
            settings.versions,
            train_config=config,
            evaluate_fn=watch.look,
            runtime=runtime,
            engine=engine,
        )


def _sites(
    scenario: ScenarioConfig, settings: RunSettings, clock: VirtualClock, learner: Learner
) -> tuple[SimulatedGrid, list[SimulatedSite]]:
    grid = SimulatedGrid(clock)
    sites = []
    for index, (name, model) in enumerate(scenario.sites.items()):
        queues, faults = (np.random.default_rng([settings.seed, kind, index]) for kind in (4, 5))
        queue = build_queue(model.queue, name, model, clock, queues)
        site = SimulatedSite(name, index, _facility(model, settings), queue, learner, clock, faults)
        grid.join(site, model.joins_s, model.leaves_s or float("inf"))
        sites.append(site)
    return grid, sites


def _facility(model: SiteModel, settings: RunSettings) -> Facility:
    shared = {
        k: getattr(model, k)
        for k in (
            "step_s",
            "nodes",
            "startup_s",
            "write_s",
            "transfer_s",
            "latency_s",
            "message_s",
        )
    }
    return Facility(
        **shared,
        walltime_s=float(walltime_s(model.walltime)),
        preemptions_per_hour=model.preemptions_per_hour,
        failures_per_hour=model.failures_per_hour,
        outages=tuple((a, b) for a, b in model.outages),
        per_round=settings.policy == "per_round",
        reserves_s=tuple(model.reserves_s),
        forecasts_s=tuple(model.forecasts_s),
        max_successors=settings.max_successors if settings.policy == "warm" else 0,
        partial_work=settings.partial_work,
    )
