"""The base of our strategies: defaults for Flower's hooks, and a start that can resume."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flwr_hpc.protocol import ARRAYS, WEIGHT_KEY
from strategies.base.fields import StoredTensors
from strategies.base.start import run_strategy
from strategies.engine import messages
from strategies.engine.engine import Engine, global_name
from strategies.engine.loop import EvaluateFn
from strategies.engine.runtime import Runtime
from strategies.engine.validate import NewWeights, check_version, shapes_of
from strategies.parts import limits, rules
from strategies.parts.blocks import Lazy
from strategies.parts.rules import Record

log = logging.getLogger("strategies")


class HpcStrategy(Strategy):
    """FedAvg over every site, made to be subclassed: `aggregate` is the part that differs.

    Parameters
    ----------
    weighted_by : str
        How much a site counts: ``num-examples`` or ``uniform``.

    Attributes
    ----------
    runtime : Runtime
        Plain Flower's surroundings unless set before `start`.
    engine : Engine or None
        Set by whoever has begun to talk to the sites already.
    arrays : ArrayRecord
        The global weights the current round started from.
    stored : ArrayRecord or None
        The newest ones that `aggregate_train` has put into the checkpoint store.
    """

    persistent: ClassVar[tuple[str, ...]] = ()  # Names of the attributes that survive a restart
    # Names of those that are times on the run's clock, which starts anew with a resumed run.
    persistent_times: ClassVar[tuple[str, ...]] = ()
    kept = 0  # How often `keep_tensors` was called

    # Low-rank factors that the newest version adds to the frozen weights under its adapters, see
    # `strategies.parts.lora.residual`.
    residual: StoredTensors | None = None
    takes_unlike_ranks = False  # Of adapters: B A counts alone, see `facilities.NAME.lora_r`
    needs_plain_adapters = False  # Of linear layers in full precision, both factors trained

    _runtime: Runtime | None = None
    engine: Engine | None = None

    def __init__(self, *, weighted_by: Literal["num-examples", "uniform"] = "num-examples"):
        limits.one_of("weighted_by", weighted_by, limits.WEIGHTINGS)
        self.weighted_by = weighted_by
        self.arrays = ArrayRecord()
        self.stored: ArrayRecord | None = None

    # ---- what a subclass changes ------------------------------------------------------------

    def aggregate(
        self, server_round: int, trained: Sequence[Record], weights: Sequence[float]
    ) -> NewWeights:
        """Return the new global weights, from the sites' trained ones.

        Yield pairs of name and tensor, one at a time, or return a mapping.
        """
        return rules.record_mean(trained, weights)

    def weight_of(self, reply: Message) -> float:
        """Return how much a reply counts, before normalisation."""
        if self.weighted_by == "uniform":
            return 1.0
        return messages.flat_metrics(reply).get(WEIGHT_KEY, 1.0)

    def keep_tensors(self, label: str, tensors: Iterable[tuple[str, Lazy]]) -> StoredTensors:
        """Put tensors into the checkpoint store, one at a time, to be read from there.

        They survive a restart, and are deleted, with the `persistent` field that holds them. No
        name is used twice: what the last checkpoint needs is never overwritten.
        """
        self.kept += 1
        name = f"{label}-{self.kept}"
        return StoredTensors(name, self.runtime.checkpoints.put(name, tensors))

    def models_kept(self, sites: int) -> int:
        """Return how many sets of tensors, as large as the model, lie on disk beside its versions.

        At most, with so many sites. Those of its parts are in it; a subclass adds its own.
        """
        parts = (getattr(part, "models_kept", None) for part in vars(self).values())
        return sum(count(sites) for count in parts if count)

    # ---- Flower's hooks ---------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every site to train."""
        self.arrays = arrays
        config["server-round"] = server_round
        content = RecordDict({ARRAYS: arrays, messages.CONFIG: config})
        return [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate what arrived; no reply, no new weights."""
        good = [r for r in replies if r.has_content()]
        weights = [self.weight_of(r) for r in good]
        if sum(weights) <= 0:
            return None, None
        trained = [next(iter(r.content.array_records.values())) for r in good]
        new = self.aggregate(server_round, trained, weights)
        model = shapes_of(self.arrays or trained[0])
        self.stored = self.runtime.checkpoints.put(
            global_name(server_round), check_version(new, model, f"{type(self).__name__}.aggregate")
        )
        return self.stored, messages.mean_metrics([messages.flat_metrics(r) for r in good])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: a launcher site evaluates a version when it starts to train from it."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the metrics, weighted by examples."""
        return messages.mean_metrics([messages.flat_metrics(r) for r in replies if r.has_content()])

    def final_metrics(self, replies: Iterable[Message]) -> MetricRecord:
        """Return the metrics of the evaluation of the last version."""
        return self.aggregate_evaluate(0, replies) or MetricRecord()

    def summary(self) -> None:
        """Log the settings."""
        settings = {k: v for k, v in vars(self).items() if isinstance(v, bool | int | float | str)}
        log.info("%s %s", type(self).__name__, settings)

    # ---- running ----------------------------------------------------------------------------

    @property
    def runtime(self) -> Runtime:
        """Surroundings of the run."""
        if self._runtime is None:
            self._runtime = Runtime()
        return self._runtime

    @runtime.setter
    def runtime(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run, from the last checkpoint if there is one; see `strategies.base.start`.

        Parameters are those of Flower's ``Strategy.start``, but a `timeout` of None (the
        default) waits for every site: queues take hours.
        """
        if timeout is not None:
            settings = dataclasses.replace(self.runtime.settings, round_deadline_s=timeout)
            self.runtime = dataclasses.replace(self.runtime, settings=settings)
        return run_strategy(
            self,
            grid,
            initial_arrays,
            num_rounds,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
            timeout=self.runtime.settings.round_deadline_s,
            runtime=self.runtime,
            engine=self.engine,
        )
