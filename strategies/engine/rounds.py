"""The synchronous loop: any Flower strategy, its own hooks, over the engine."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flwr_hpc.protocol import WEIGHT_KEY
from strategies.base.persistence import load_result, load_strategy, result_state, save_strategy
from strategies.engine import messages
from strategies.engine.engine import Engine, global_name
from strategies.engine.evaluation import final_evaluation
from strategies.engine.online_grid import OnlineSitesGrid
from strategies.engine.round_trip import RoundTrip
from strategies.engine.runtime import RunFailed, Runtime
from strategies.parts.rules import Record, Tensors, normalised, tensors

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
log = logging.getLogger("strategies")


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int = 3,
    *,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    evaluate_fn: EvaluateFn | None = None,
    timeout: float | None = None,
    runtime: Runtime | None = None,
    engine: Engine | None = None,
) -> Result:
    """Run a synchronous strategy from its last checkpoint, or from the start.

    Version r of the global model is the one that round r aggregated; a failed round makes none.

    Parameters
    ----------
    strategy : Strategy
        Ours, Flower's or a user's: ``configure_*`` and ``aggregate_*`` are called as by
        Flower's own ``start``; ``steps`` in the train config becomes the order's steps.
    grid, initial_arrays, num_rounds, train_config, evaluate_config, evaluate_fn :
        As of ``Strategy.start``. After a resume the initial arrays are not used.
    timeout : float or None
        Seconds after which a round aggregates what has arrived; default:
        ``Settings.round_deadline_s``.
    runtime, engine :
        Default: plain Flower surroundings, and an engine that is released at the end.

    Raises
    ------
    RunFailed
        After ``Settings.max_failed_rounds`` failed rounds in a row.
    """
    runtime = runtime or Runtime()
    used = engine or Engine(grid, runtime)
    loop = _Rounds(strategy, grid, used, evaluate_fn, timeout or runtime.settings.round_deadline_s)
    try:
        loop.begin(initial_arrays)
        return loop.run(num_rounds, train_config, evaluate_config)
    finally:
        if engine is None:
            used.release()


class _Rounds:
    def __init__(
        self,
        strategy: Strategy,
        grid: Grid,
        engine: Engine,
        evaluate_fn: EvaluateFn | None,
        deadline_s: float | None,
    ) -> None:
        self.strategy = strategy
        self.engine = engine
        self.runtime = engine.runtime
        self.settings = engine.runtime.settings
        self.roster = OnlineSitesGrid(grid, engine)
        self.evaluate_fn = evaluate_fn
        self.trip = RoundTrip(engine, deadline_s, getattr(strategy, "stores_arrays", False))
        self.arrays = ArrayRecord()
        self.version = 0
        self.round = 0
        self.trained = False  # the training part of `round` is done, its evaluation is not
        self.failed = 0
        self.result = Result()
        self._saved: dict[str, Any] = {"tensors": []}

    # ---- beginning and checkpoint -----------------------------------------------------------

    def begin(self, initial: ArrayRecord) -> None:
        """Restore, or make the initial weights version 0."""
        store, state = self.runtime.checkpoints, self.engine.restored
        if state is None:
            self.strategy.summary()
            self.arrays = store.put(global_name(0), tensors(initial))
            self._evaluate_here(0)
            self._save(strategy_changed=True)
            return
        self.version, self.round = state["version"], state["round"]
        self.trained, self.failed = state["trained"], state["failed"]
        self.result = load_result(state["result"])
        self.arrays = store.get(global_name(self.version))
        self._saved = state["strategy"]
        load_strategy(self.strategy, store, self._saved)
        log.info("resumed after round %d with version %d", self.round, self.version)

    def _save(self, *, strategy_changed: bool = False) -> None:
        if strategy_changed:
            self._saved = save_strategy(self.strategy, self.runtime.checkpoints, str(self.round))
        state = {
            "version": self.version,
            "round": self.round,
            "trained": self.trained,
            "failed": self.failed,
            "result": result_state(self.result),
            "strategy": self._saved,
        }
        self.engine.settle()
        names = [global_name(self.version), *self._saved["tensors"]]
        self.engine.note(state, names)
        self.engine.commit()

    # ---- the loop ---------------------------------------------------------------------------

    def run(
        self, rounds: int, train_config: ConfigRecord | None, evaluate_config: ConfigRecord | None
    ) -> Result:
        """Go on to the last round."""
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        while self.round < rounds or self.trained:
            if not self.trained:
                self.round += 1
                log.info("[ROUND %d/%d]", self.round, rounds)
                self._train(train_config)
            self._evaluate(evaluate_config)
            self._evaluate_here(self.round)
            self.trained = False
            self._save()
        replies = final_evaluation(self.engine, self.version, self.arrays)
        finish = getattr(self.strategy, "final_metrics", None)
        if callable(finish) and replies:
            self.result.evaluate_metrics_clientapp.setdefault(self.round, finish(replies))
        self.result.arrays = self.arrays
        return self.result

    def _train(self, config: ConfigRecord) -> None:
        arrays: ArrayRecord | None = None
        asked = False
        replies: list[Message] = []
        enough = self._enough_sites()
        if enough:
            self._seed("train")
            configured = self.strategy.configure_train(
                self.round, self.arrays, config, self.roster.fresh()
            )
            asked, replies = self.trip.exchange(configured, "train", self.version, self.arrays)
        good = [r for r in replies if r.has_content()]
        if not asked or len(good) >= self.settings.min_sites:
            arrays, metrics = self.strategy.aggregate_train(self.round, replies)
            if metrics is not None:
                self.result.train_metrics_clientapp[self.round] = metrics
        if arrays:
            self.arrays = self._publish(arrays)
            self.version, self.failed = self.round, 0
        elif asked or not enough:
            self._count_failure()
        self.trained = True
        self._save(strategy_changed=True)
        if arrays:
            self._tell(good)

    def _seed(self, phase: str) -> None:
        """Let a strategy that samples sites sample the same ones after a resume."""
        random.seed(f"{self.runtime.run_key}:{self.round}:{phase}")

    def _publish(self, arrays: ArrayRecord) -> ArrayRecord:
        """Put new weights into the store, unless the strategy has done so."""
        if getattr(self.strategy, "stores_arrays", False):
            return arrays
        return self.runtime.checkpoints.put(
            global_name(self.round), _in_dtypes_of(self.arrays, arrays)
        )

    def _count_failure(self) -> None:
        """Go on with the weights unchanged, but not for ever."""
        self.failed += 1
        log.warning("round %d brought no new weights", self.round)
        if self.failed >= self.settings.max_failed_rounds:
            causes = "; ".join(f"{f}: {r}" for f, r in sorted(self.trip.reasons.items()))
            raise RunFailed(
                f"{self.failed} rounds in a row brought too few results "
                f"(needed {self._needed()}). Last: {causes or 'no site was reachable'}"
            )

    def _evaluate(self, config: ConfigRecord) -> None:
        if not self._enough_sites():
            return
        self._seed("evaluate")
        configured = self.strategy.configure_evaluate(
            self.round, self.arrays, config, self.roster.fresh()
        )
        _, replies = self.trip.exchange(configured, "evaluate", self.version, self.arrays)
        metrics = self.strategy.aggregate_evaluate(self.round, replies)
        if metrics is not None:
            self.result.evaluate_metrics_clientapp[self.round] = metrics

    def _evaluate_here(self, server_round: int) -> None:
        metrics = self.evaluate_fn(server_round, self.arrays) if self.evaluate_fn else None
        if metrics is not None:
            self.result.evaluate_metrics_serverapp[server_round] = metrics

    def _needed(self) -> int:
        """Return how many sites a round needs; fewer, and Flower's sampling would hang."""
        keys = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
        return max([self.settings.min_sites, *(getattr(self.strategy, k, 0) for k in keys)])

    def _enough_sites(self) -> bool:
        until = self.engine.now() + self.settings.offline_grace_s
        while len(self.engine.reachable()) < self._needed():
            if self.engine.now() >= until:
                return False
            self.engine.discover()
        return True

    def _tell(self, replies: Iterable[Message]) -> None:
        shares = {
            self.engine.facility_of[r.metadata.src_node_id]: _weight(self.strategy, r)
            for r in replies
        }
        weights = dict(zip(shares, normalised(list(shares.values())), strict=True))
        self.runtime.emit(
            "aggregated",
            version=self.version,
            round=self.round,
            facilities=sorted(shares),
            staleness=dict.fromkeys(sorted(shares), 0),
            weights=weights,
        )


def _weight(strategy: Strategy, reply: Message) -> float:
    own = getattr(strategy, "weight_of", None)
    value = own(reply) if callable(own) else messages.flat_metrics(reply).get(WEIGHT_KEY, 1.0)
    return float(value) or 1e-12


def _in_dtypes_of(reference: Record, arrays: ArrayRecord) -> Tensors:
    """Keep the model's dtypes: FedAdam's numpy scalars make float64 out of float32."""
    for name, tensor in tensors(arrays):
        same = name in reference and tensor.dtype != (dtype := reference[name].numpy().dtype)
        yield name, np.asarray(tensor, dtype=dtype) if same else tensor
