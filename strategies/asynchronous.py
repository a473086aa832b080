"""The asynchronous loop: every site trains all the time, an arrival may make a new version."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from strategies import messages
from strategies.base import HpcStrategy, mean_metrics
from strategies.engine import Engine, global_name
from strategies.evaluation import final_evaluation
from strategies.persistence import load_result, load_strategy, result_state, save_strategy
from strategies.rounds import EvaluateFn
from strategies.rules import Tensor, tensors
from strategies.runtime import RunFailed
from strategies.sites import Arrival, Failure

__all__ = ["AsyncStrategy"]

log = logging.getLogger("strategies")


class AsyncStrategy(HpcStrategy):
    """Base of asynchronous strategies: `on_arrival` is the part that differs.

    ``num_rounds`` counts new versions of the global model.

    Attributes
    ----------
    arrays : ArrayRecord
        The newest global weights.
    version : int
        Their version.
    """

    def __init__(self, *, weighted_by: Literal["num-examples", "uniform"] = "uniform"):
        super().__init__(weighted_by=weighted_by)
        self.version = 0

    @abstractmethod
    def on_arrival(self, arrival: Arrival, staleness: int) -> Iterable[tuple[str, Tensor]] | None:
        """Take a site's trained weights in.

        Parameters
        ----------
        arrival : Arrival
            ``arrays`` are the trained weights, ``base`` those the site started from.
        staleness : int
            Versions made since the site received its weights.

        Returns
        -------
        iterable of (name, tensor), or None
            The next version of the global weights, if this arrival makes one.
        """

    def staleness_weight(self, staleness: int) -> float:
        """Return how much an update of that staleness counts."""
        return 1.0

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
        self.window: list[dict[str, Any]] = []  # arrivals since the newest version
        self.failures: dict[str, int] = {}
        self.not_before: dict[str, float] = {}

    def begin(self, initial: ArrayRecord) -> None:
        """Restore, or make the initial weights version 0."""
        store, state, strategy = self.runtime.checkpoints, self.engine.restored, self.strategy
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
            self.window = state["window"]
            log.info("resumed with version %d", strategy.version)
        self._save()

    def _save(self) -> None:
        version = self.strategy.version
        own = save_strategy(self.strategy, self.runtime.checkpoints, str(version))
        state = {
            "version": version,
            "round": version,
            "window": self.window,
            "result": result_state(self.result),
            "strategy": own,
        }
        self.engine.commit(state, [global_name(version), *own["tensors"]])

    def run(self, versions: int) -> Result:
        """Keep every site busy until there are enough versions."""
        strategy = self.strategy
        while strategy.version < versions:
            self.engine.reattach(lambda v: self.runtime.checkpoints.get(global_name(v)))
            self._keep_busy()
            for event in self.engine.events():
                if isinstance(event, Failure):
                    self._failed(event)
                elif event.order.kind == "train" and strategy.version < versions:
                    self._arrived(event)
                else:
                    self.engine.settle(event.facility)
        self.result.arrays = strategy.arrays
        replies = final_evaluation(self.engine, strategy.version, strategy.arrays)
        if replies:
            metrics = strategy.final_metrics(replies)
            self.result.evaluate_metrics_clientapp[strategy.version] = metrics
        return self.result

    def _keep_busy(self) -> None:
        now = self.engine.now()
        for facility, site in sorted(self.engine.sites.items()):
            rested = now >= self.not_before.get(facility, now)
            if site.online and rested and not self.engine.busy(facility):
                self.engine.request(
                    facility,
                    "train",
                    steps=self.steps,
                    options={**self.options, "server-round": self.strategy.version + 1},
                    weights=lambda: (self.strategy.version, self.strategy.arrays),
                )

    def _arrived(self, arrival: Arrival) -> None:
        """Take an arrival in and make it durable, so that none is lost or counted twice."""
        strategy, facility = self.strategy, arrival.facility
        self.failures.pop(facility, None)
        staleness = strategy.version - arrival.order.version
        entry = {
            "facility": facility,
            "staleness": staleness,
            "weight": strategy.staleness_weight(staleness),
            "metrics": messages.flat_metrics(arrival.message),
        }
        new = strategy.on_arrival(arrival, staleness)
        self.window.append(entry)
        aggregated = self._new_version(new) if new is not None else None
        self.engine.settle(facility)
        self._save()
        if aggregated is not None:
            self.runtime.emit("aggregated", **aggregated)

    def _new_version(self, new: Iterable[tuple[str, Tensor]]) -> Mapping[str, Any]:
        strategy, window = self.strategy, self.window
        strategy.arrays = self.runtime.checkpoints.put(global_name(strategy.version + 1), new)
        strategy.version += 1
        metrics = mean_metrics([e["metrics"] for e in window])
        if metrics is not None:
            self.result.train_metrics_clientapp[strategy.version] = metrics
        self._evaluate_here()
        self.window = []
        staleness: dict[str, int] = {}
        weights: dict[str, float] = {}
        for entry in window:
            name = entry["facility"]
            staleness[name] = max(staleness.get(name, 0), entry["staleness"])
            weights[name] = weights.get(name, 0.0) + entry["weight"] / len(window)
        return {
            "version": strategy.version,
            "facilities": sorted(weights),
            "staleness": staleness,
            "weights": weights,
        }

    def _failed(self, failure: Failure) -> None:
        """Leave a failing site alone for a while; when all fail, end with their reasons."""
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
        metrics = self.evaluate_fn(version, self.strategy.arrays) if self.evaluate_fn else None
        if metrics is not None:
            self.result.evaluate_metrics_serverapp[version] = metrics
