"""The asynchronous loop: every site trains all the time, an arrival may make a new version."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from flwr_hpc.protocol import Order
from strategies.base.fields import StoredTensors
from strategies.base.persistence import (
    forget_metrics,
    load_result,
    load_strategy,
    result_state,
    save_strategy,
)
from strategies.base.synchronous import HpcStrategy, mean_metrics
from strategies.engine import messages
from strategies.engine.engine import Engine, global_name
from strategies.engine.evaluation import final_evaluation
from strategies.engine.gathered import Gathered, shares
from strategies.engine.rounds import EvaluateFn
from strategies.engine.runtime import RunFailed
from strategies.engine.state import Bind, Binding, Event, Failure, Plan, SiteResult, SiteState
from strategies.parts.rules import Tensor, in_dtypes_of, tensors

KEPT_METRICS = 1000  # versions: a run may make many more, and saves them with every order

log = logging.getLogger("strategies")


class AsyncStrategy(HpcStrategy):
    """Base of asynchronous strategies: `on_result` is the part that differs.

    ``num_rounds`` counts new versions of the global model. The result has the metrics of the last
    1000 of them.

    Attributes
    ----------
    arrays : ArrayRecord
        The newest global weights.
    version : int
        Their version.
    sites : mapping of str to SiteState
        By facility; filled as sites come.
    default_steps : int
        Of an order, as the run is configured.
    busy : callable
        ``busy(facility)``: whether it has an order.
    """

    def __init__(self, *, weighted_by: Literal["num-examples", "uniform"] = "uniform"):
        super().__init__(weighted_by=weighted_by)
        self.version = 0
        self.sites: Mapping[str, SiteState] = {}
        self.default_steps = 0
        self.busy: Callable[[str], bool] = lambda facility: False

    def now(self) -> float:
        """Return the time on the run's clock."""
        return self.runtime.clock.now()

    @abstractmethod
    def on_result(self, arrival: SiteResult, staleness: int) -> Iterable[tuple[str, Tensor]] | None:
        """Take a site's trained weights in.

        Parameters
        ----------
        arrival : SiteResult
            ``arrays`` are the trained weights, ``base`` those the site started from.
        staleness : int
            Versions made since the site received its weights.

        Returns
        -------
        iterable of (name, tensor), or None
            The next version of the global weights, if this arrival makes one.
        """

    def counts(self, arrival: SiteResult, staleness: int) -> bool:
        """Return whether an arrival has a part in a version, this one or a later one."""
        return True

    def pending(self) -> Iterable[str]:
        """Return the ids of the orders that arrived and wait for a version after the newest."""
        return ()

    def published(self) -> ArrayRecord:
        """Return the weights that stand for the run: `evaluate_fn` sees them.

        The last version is made of them, in the dtypes of the others.
        """
        return self.arrays

    def newest(self) -> StoredTensors:
        """Return the newest weights as something that a `persistent` field may hold."""
        return StoredTensors(global_name(self.version), self.arrays)

    def staleness_weight(self, staleness: int) -> float:
        """Return how much an update of that staleness counts."""
        return 1.0

    def plan(self, site: SiteState) -> Plan | None:
        """Return what a site that has nothing to do is to do; None: let it wait."""
        return Plan()

    def plan_next(self, site: SiteState) -> Plan | None:
        """Return the order that is to wait at a site for the running one to end; None: none."""
        return None

    def wake_at(self) -> float | None:
        """Return when `on_wake` is to be called, on the run's clock; None: not now."""
        return None

    def on_wake(self) -> Iterable[tuple[str, Tensor]] | None:
        """Do what is due by the clock; a new version, or None."""
        return None

    def on_failure(self, failure: Failure) -> None:
        """Learn that a site gave an order up."""

    def loop(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        train_config: ConfigRecord | None,
        evaluate_config: ConfigRecord | None,
        evaluate_fn: EvaluateFn | None,
    ) -> Result:
        """Run until there are `num_rounds` versions."""
        engine = self.engine or Engine(grid, self.runtime)
        loop = _AsyncLoop(self, engine, train_config or ConfigRecord(), evaluate_fn)
        try:
            loop.begin(initial_arrays)
            return loop.run(num_rounds)
        finally:
            if self.engine is None:
                engine.release()


class _AsyncLoop:
    def __init__(
        self,
        strategy: AsyncStrategy,
        engine: Engine,
        config: ConfigRecord,
        evaluate_fn: EvaluateFn | None,
    ) -> None:
        self.strategy = strategy
        self.engine = engine
        self.runtime = engine.runtime
        self.settings = engine.runtime.settings
        self.evaluate_fn = evaluate_fn
        self.options = messages.options_of(RecordDict({messages.CONFIG: config}))
        self.steps = int(self.options.pop("steps", 0))
        self.result = Result()
        self._told: dict[str, Any] = {}  # the result in the last checkpoint
        self.versions = 0  # to be made
        self.gathered = Gathered()
        self.failures: dict[str, int] = {}
        self.not_before: dict[str, float] = {}

    def begin(self, initial: ArrayRecord) -> None:
        """Restore, or make the initial weights version 0."""
        store, state, strategy = self.runtime.checkpoints, self.engine.restored, self.strategy
        strategy.default_steps = self.steps
        strategy.sites, strategy.busy = self.engine.sites, self.engine.busy
        if state is None:
            strategy.summary()
            strategy.arrays = store.put(global_name(0), tensors(initial))
            self._evaluate_here()
            self.engine.settle()
        else:
            strategy.version = state["version"]
            strategy.arrays = store.get(global_name(strategy.version))
            load_strategy(strategy, store, state["strategy"])
            self.result = load_result(state["result"])
            self.gathered.entries = state["window"]
            log.info("resumed with version %d", strategy.version)
        self._save()

    def _save(self) -> None:
        self._note()
        self.engine.commit()

    def _note(self) -> None:
        version = self.strategy.version
        own = save_strategy(self.strategy, self.runtime.checkpoints, str(version))
        self._told = result_state(self.result, self._told)
        state = {
            "version": version,
            "round": version,
            "window": self.gathered.entries,
            "result": self._told,
            "strategy": own,
        }
        self.engine.note(state, [global_name(version), *own["tensors"]])

    def run(self, versions: int) -> Result:
        """Keep every site busy until there are enough versions."""
        strategy, self.versions = self.strategy, versions
        while strategy.version < versions:
            self.engine.reattach(lambda v: self.runtime.checkpoints.get(global_name(v)))
            self._keep_busy()
            self._take(self.engine.events())
        self.result.arrays = strategy.arrays
        replies = final_evaluation(self.engine, strategy.version, strategy.arrays)
        if replies:
            metrics = strategy.final_metrics(replies)
            self.result.evaluate_metrics_clientapp[strategy.version] = metrics
        return self.result

    def _keep_busy(self) -> None:
        now, strategy, asked = self.engine.now(), self.strategy, False
        for facility, site in sorted(self.engine.sites.items()):
            rested = now >= self.not_before.get(facility, now)
            if not (site.online and rested):
                continue
            if not self.engine.busy(facility):
                plan = strategy.plan(site)
            elif self.engine.due_ahead(facility):
                plan = strategy.plan_next(site)
            else:
                continue
            if plan is not None:
                asked = True
                self.engine.request(
                    facility,
                    "train",
                    steps=plan.steps or self.steps,
                    options={
                        **self.options,
                        **plan.options,
                        "server-round": strategy.version + 1,
                    },
                    weights=lambda: (strategy.version, strategy.arrays),
                    ahead_after_s=plan.ahead_after_s,
                    further=plan.further,
                    bind=self._noting(plan.bind),
                )
        if asked:
            self._note()  # the engine commits it ahead of sending the orders

    def _noting(self, bind: Bind | None) -> Bind | None:
        """Commit what a strategy notes as an order is handed in together with the order."""
        if bind is None:
            return None

        def noted(running: Order | None) -> Binding:
            found = bind(running)
            self._note()
            return found

        return noted

    def _take(self, events: list[Event]) -> None:
        """Take in what has come, and make it durable: none is lost or counted twice."""
        made = []
        for event in events:
            if isinstance(event, Failure):
                self._failed(event)
            elif event.order.kind == "train" and self.strategy.version < self.versions:
                made.append(self._arrived(event))
                self.engine.settle(event.facility)
            else:
                self.engine.settle(event.facility)
        due = self.strategy.wake_at()
        woken = (
            due is not None and due <= self.engine.now() and self.strategy.version < self.versions
        )
        if woken:
            new = self.strategy.on_wake()
            made.append(self._new_version(new) if new is not None else None)
        if made:
            self._save()
        for aggregated in made:
            if aggregated is not None:
                self.runtime.emit("aggregated", **aggregated)

    def _arrived(self, arrival: SiteResult) -> Mapping[str, Any] | None:
        """Take an arrival in; returns what there is to tell of the version it made, if any."""
        strategy = self.strategy
        self.failures.pop(arrival.facility, None)
        staleness = strategy.version - arrival.order.version
        if strategy.counts(arrival, staleness):
            self.gathered.add(arrival)
        new = strategy.on_result(arrival, staleness)
        return self._new_version(new) if new is not None else None

    def _new_version(self, new: Iterable[tuple[str, Tensor]]) -> Mapping[str, Any]:
        strategy = self.strategy
        self._put(global_name(strategy.version + 1), new)
        taken = self.gathered.take(strategy.pending())
        told = shares(taken, strategy.version, strategy.staleness_weight)
        strategy.version += 1
        metrics = mean_metrics([e["metrics"] for e in taken])
        if metrics is not None:
            self.result.train_metrics_clientapp[strategy.version] = metrics
        forget_metrics(self.result, strategy.version - KEPT_METRICS)
        self._evaluate_here()
        return {"version": strategy.version, **told}

    def _put(self, name: str, new: Iterable[tuple[str, Tensor]]) -> None:
        """Store a version; the last one is what the strategy publishes."""
        strategy, store = self.strategy, self.runtime.checkpoints
        strategy.arrays = store.put(name, new)
        last = strategy.published()
        if strategy.version + 1 >= self.versions and last is not strategy.arrays:
            strategy.arrays = store.put(name, in_dtypes_of(strategy.arrays, last))

    def _failed(self, failure: Failure) -> None:
        """Leave a failing site alone for a while; when all fail, end with their reasons."""
        self.strategy.on_failure(failure)
        count = self.failures.get(failure.facility, 0) + 1
        self.failures[failure.facility] = count
        pause = min(self.settings.backoff_s * 2.0 ** (count - 1), self.settings.backoff_max_s)
        self.not_before[failure.facility] = self.engine.now() + pause
        log.warning("%s failed: %s; next try in %.0f s", failure.facility, failure.reason, pause)
        limit = self.settings.max_failed_rounds
        if all(self.failures.get(name, 0) >= limit for name in self.engine.sites):
            raise RunFailed(
                f"every site failed {limit} times in a row. "
                f"Last: {failure.facility}: {failure.reason}"
            )

    def _evaluate_here(self) -> None:
        version = self.strategy.version
        metrics = self.evaluate_fn(version, self.strategy.published()) if self.evaluate_fn else None
        if metrics is not None:
            self.result.evaluate_metrics_serverapp[version] = metrics
