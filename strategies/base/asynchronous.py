"""Asynchronous strategies: every site trains all the time, a result may make a version."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from flwr_hpc.protocol import Order
from strategies.base.fields import StoredTensors
from strategies.base.hpc_strategy import HpcStrategy
from strategies.base.persistence import load_strategy, save_strategy
from strategies.engine import messages
from strategies.engine.engine import Engine, global_name
from strategies.engine.state import Binding, ExtraArrays, Failure, Plan, SiteResult, SiteState
from strategies.engine.validate import NewWeights
from strategies.parts.average import PublishedAverage
from strategies.parts.lora import adapters
from strategies.parts.pace import SpeedEstimate
from strategies.parts.rules import Record
from strategies.parts.sizing import OrderSizing


class AsyncStrategy(HpcStrategy):
    """Base of asynchronous strategies: `on_result` is the part that differs.

    ``num_rounds`` counts new versions of the global model. The result has the metrics of the last
    1000 of them.

    Parameters
    ----------
    average : float or None
        gamma of an average of the versions (`strategies.parts.average`), which is published in
        place of the newest one: the last version of a run is this average. It takes out the
        noise of large steps. None: the newest is published.
    size_steps : bool
        Size orders to a site's speed and to what is left of its walltime
        (`strategies.parts.sizing`); else they have the configured steps.
    round_s : float or None
        Seconds of training of such an order (None: five times what an order costs besides).
    min_steps, max_steps : int
        Bounds of such an order.

    Attributes
    ----------
    arrays : ArrayRecord
        The newest global weights.
    version : int
        Their version.
    sites : mapping of str to SiteState
        By facility; filled as sites come. Who has left is in it still.
    num_sites : int
        How many of them are online, or were so shortly before; at least 1.
    versions : float
        To be made.
    default_steps : int
        Of an order, as the run is configured.
    busy : callable
        ``busy(facility)``: whether it has an order.
    rests : callable
        ``rests(facility)``: whether it has failed and is left alone for a while.
    combined : Combination or None
        The average that the version being made comes from (`averaged`)
        and before any momentum; `strategies.parts.lora.adapters` measures how exact it is.
    """

    in_rounds = False

    def __init__(
        self,
        *,
        average: float | None = None,
        size_steps: bool = False,
        round_s: float | None = None,
        min_steps: int = 10,
        max_steps: int = 4000,
    ) -> None:
        super().__init__(weighted_by="uniform")
        self.average = PublishedAverage(average)
        self.size_steps = size_steps
        self.sizing = OrderSizing(round_s, min_steps, max_steps)
        self.pace = SpeedEstimate(0.7)
        self.version = 0
        self.sites: Mapping[str, SiteState] = {}
        self.num_sites = 1
        self.versions = math.inf
        self.default_steps = 0
        self.default_options: Mapping[str, Any] = {}
        self.busy: Callable[[str], bool] = lambda facility: False
        self.rests: Callable[[str], bool] = lambda facility: False
        self.combined: adapters.Combination | None = None

    def now(self) -> float:
        """Return the time on the run's clock."""
        return self.runtime.clock.now()

    @abstractmethod
    def on_result(self, result: SiteResult, staleness: int) -> NewWeights | None:
        """Take a site's trained weights in; results of no step at all do not come here.

        Parameters
        ----------
        result : SiteResult
            ``arrays`` are the trained weights, ``base`` those the site started from.
        staleness : int
            Versions made since the site received its weights.

        Returns
        -------
        iterable of (name, tensor), mapping, or None
            The next version of the global weights, if this result makes one.
        """

    def counts(self, result: SiteResult, staleness: int) -> bool:
        """Return whether a result has a part in a version, this one or a later one."""
        return True

    def sites_needed(self) -> int:
        """Return how many sites it takes to make a version."""
        return 1

    def pending(self) -> Iterable[str]:
        """Return the ids of the orders that arrived and wait for a version after the newest."""
        return ()

    def published(self) -> ArrayRecord:
        """Return the weights that stand for the run: `evaluate_fn` sees them.

        The last version is made of them, in the dtypes of the others.
        """
        return self.arrays if self.average.mean is None else self.average.mean.arrays

    def evaluation_arrays(self) -> ExtraArrays:
        """Return what an evaluation of the newest version carries beside its weights."""
        return {}

    def averaged(self, deltas: Sequence[Record], weights: Sequence[float]) -> None:
        """Say that the version being made is ``theta - sum_k w_k delta_k``, momentum apart."""
        points = [adapters.point(delta) for delta in deltas]
        self.combined = adapters.step_of(self.arrays, points, weights)

    def version_weight(self, updates: int) -> float:
        """Return the part of a round that the newest version stands for, made of so many updates.

        The average of the versions weighs them by it.
        """
        return updates / self.num_sites

    def newest(self) -> StoredTensors:
        """Return the newest weights as something that a `persistent` field may hold."""
        return StoredTensors(global_name(self.version), self.arrays)

    def staleness_weight(self, staleness: int) -> float:
        """Return how much an update of that staleness counts."""
        return 1.0

    def plan(self, site: SiteState) -> Plan | None:
        """Return what a site that has nothing to do is to do; None: let it wait."""
        return Plan(self.order_steps(site))

    def order_steps(self, site: SiteState) -> int:
        """Return the steps of a site's next order, by `size_steps`; 0: as configured."""
        return self.sizing.steps(site, self.pace, self.now()) if self.size_steps else 0

    def plan_next(self, site: SiteState) -> Plan | None:
        """Return the order that is to wait at a site for the running one to end; None: none."""
        return None

    def wake_at(self) -> float | None:
        """Return when `on_wake` is to be called, on the run's clock; None: not now."""
        return None

    def on_wake(self) -> NewWeights | None:
        """Do what is due by the clock; a new version, or None."""
        return None

    def on_failure(self, failure: Failure) -> None:
        """Learn that a site gave an order up, or that its result does not count."""

    def observe(self, result: SiteResult) -> None:
        """Learn how fast a site is, ahead of `on_result`."""
        if self.size_steps:
            self.pace.observe(result)

    # ---- what the loop asks for; nothing to override ------------------------------------------

    def on_version(self, former: ArrayRecord, updates: int) -> None:
        """Take the newest version, which so many updates have made of the former, as made."""
        weight = self.version_weight(updates)
        self.average.add(self.keep_tensors, former, self.arrays, weight)

    def configure(self, train_config: ConfigRecord) -> None:
        """Take the configuration of the orders."""
        options = messages.options_of(RecordDict({messages.CONFIG: train_config}))
        self.default_steps = int(options.pop("steps", 0))
        self.default_options = options

    def begin(self, engine: Engine, versions: int) -> None:
        """Learn what to run in, and for how many versions."""
        self.sites, self.busy, self.versions = engine.sites, engine.busy, versions
        self.runtime = engine.runtime

    def finished(self) -> bool:
        """Return whether there are enough versions."""
        return self.version >= self.versions

    def next_version(self) -> int:
        """Return the number of the next version."""
        return self.version + 1

    def fill(self, plan: Plan) -> Plan:
        """Fill a plan's gaps with the defaults."""
        options = {**self.default_options, **plan.options, "server-round": self.version + 1}
        steps = plan.steps or self.default_steps
        bind = plan.bind or (lambda running: Binding(self.version, self.arrays))
        return dataclasses.replace(plan, steps=steps, options=options, bind=bind, late=True)

    def resume(self, order: Order) -> Plan:
        """Return the plan of an order of an interrupted run."""
        binding = Binding(order.version, self.runtime.checkpoints.get(global_name(order.version)))
        return Plan(
            order.steps, order.options, kind=order.kind, bind=lambda running: binding, late=True
        )

    def reported_weight(self, facility: str, staleness: int, updates: int) -> float:
        """Return the weight, among so many, of an update in a version."""
        return self.staleness_weight(staleness) / updates

    def adapter_facts(self) -> dict[str, Any]:
        """Return what is to tell of the adapters in the version that was just made."""
        combined, self.combined = self.combined, None
        silent = f"{type(self).__name__} does not say how it averages"
        return adapters.facts(combined or silent, self.arrays)

    def save(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return save_strategy(self, self.runtime.checkpoints, str(self.version))

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `save`."""
        load_strategy(self, self.runtime.checkpoints, state)
