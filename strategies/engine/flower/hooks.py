"""Flower's hooks over the event loop: any Flower strategy, round by round.

``configure_train`` becomes orders; when all of them have arrived or failed, or at the deadline,
``aggregate_train`` makes a version. Then the same with ``configure_evaluate``. Version r of the
global model is the one that round r aggregated; a failed round makes none.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flwr_hpc.protocol import Order, OrderKind
from strategies.base.persistence import load_strategy, save_strategy
from strategies.engine import messages
from strategies.engine.engine import Engine
from strategies.engine.flower.alike import make_alike, weight_key_of
from strategies.engine.flower.mean import aggregate
from strategies.engine.flower.shares import average_of, shares_of
from strategies.engine.loop import History
from strategies.engine.runtime import RunFailed
from strategies.engine.state import Binding, ExtraArrays, Failure, Plan, SiteResult, SiteState
from strategies.engine.validate import NewWeights
from strategies.parts.lora.adapters import facts

PATIENCE = 4  # Flower's sample_nodes asks twice; who asks more often waits for somebody

log = logging.getLogger("strategies")


class _Exchange:
    """The messages of one ``configure_*`` and what became of them, by facility."""

    def __init__(self, until: float | None) -> None:
        self.until = until
        self.sent: dict[str, Message] = {}
        self.plans: dict[str, Plan] = {}  # not asked for yet
        self.replies: dict[str, Message] = {}
        self.reasons: dict[str, str] = {}

    @property
    def waiting(self) -> list[str]:
        """Who has not answered yet."""
        return [facility for facility in self.sent if self.awaits(facility)]

    def awaits(self, facility: str) -> bool:
        """Return whether a site was asked and has not answered yet."""
        answered = facility in self.replies or facility in self.reasons
        return facility in self.sent and not answered

    def complete(self) -> bool:
        """Return whether nobody is left to wait for."""
        return len(self.replies) + len(self.reasons) == len(self.sent)

    def answers(self, layers: Iterable[Strategy], *, trained: bool) -> list[Message]:
        """Return one reply per facility, by name; who failed or is late answers with an error."""
        for name, message in self.sent.items():
            if name not in self.replies:
                reason = self.reasons.setdefault(name, "not done by the round's deadline")
                self.replies[name] = messages.error_reply(message, reason)
        replies = [self.replies[name] for name in sorted(self.replies)]
        return make_alike(replies, weight_key_of(layers), trained=trained)


class FlowerHooks:
    """Drives the loop by the hooks of a Flower strategy.

    Parameters
    ----------
    strategy : Strategy
    grid : Grid
    evaluate_config : ConfigRecord
    history : History
    deadline_s : float or None
        Of a round.
    """

    in_rounds = True

    def __init__(
        self,
        strategy: Strategy,
        grid: Grid,
        evaluate_config: ConfigRecord,
        history: History,
        deadline_s: float | None,
    ) -> None:
        self.strategy = strategy
        self.version, self.arrays, self.num_sites = 0, ArrayRecord(), 1
        self.stored: ArrayRecord | None = None
        self.rests: Callable[[str], bool] = lambda facility: False
        self.round = 0  # the last one whose training is done
        self.trained = False  # and its evaluation is not
        self.failed = 0  # rounds in a row
        self._plain_grid, self._history = grid, history
        self._configs = [ConfigRecord(), evaluate_config]  # of training and of evaluation
        self._deadline_s = deadline_s
        self._exchange: _Exchange | None = None
        self._gives_up_at: float | None = None  # waiting for enough sites
        self._weights: dict[str, float] = {}  # in the newest version
        self._adapter_facts: dict[str, Any] = {}
        self._reasons: dict[str, str] = {}
        self._saved: dict[str, Any] = {"tensors": []}

    # ---- what the loop asks for -------------------------------------------------------------

    def configure(self, train_config: ConfigRecord) -> None:
        """Take the configuration of the orders."""
        self._configs[0] = train_config

    def begin(self, engine: Engine, versions: int) -> None:
        """Learn what to run in, and for how many rounds."""
        self._engine, self._settings, self._rounds = engine, engine.runtime.settings, versions
        self._deadline_s = self._deadline_s or self._settings.round_deadline_s
        self._grid = OnlineSitesGrid(self._plain_grid, engine)
        for strategy in self._layers():
            if hasattr(type(strategy), "runtime"):  # one of ours, in a wrapper of Flower's
                strategy.runtime = engine.runtime  # type: ignore[attr-defined]
        self._save_strategy()

    def finished(self) -> bool:
        """Return whether the last round is over."""
        return self.round >= self._rounds and not self.trained

    def next_version(self) -> int:
        """Return the round that has just been aggregated."""
        return self.round

    def fill(self, plan: Plan) -> Plan:
        """Return the plan as it is."""
        return plan

    def plan(self, site: SiteState) -> Plan | None:
        """Return the order that the round's message to a site is."""
        exchange = self._open()
        return exchange.plans.pop(site.facility, None) if exchange else None

    def plan_next(self, site: SiteState) -> Plan | None:
        """Return nothing: a round waits for all."""
        return None

    def resume(self, order: Order) -> Plan | None:
        """Return the plan of an interrupted round that was this order."""
        exchange = self._open()
        plan = exchange.plans.get(order.facility) if exchange else None
        if exchange is None or plan is None or plan.kind != order.kind:
            return None
        return exchange.plans.pop(order.facility) if order.version == self.version else None

    def observe(self, result: SiteResult) -> None:
        """Rounds have no use for a site's speed."""

    def on_version(self, former: ArrayRecord, updates: int) -> None:
        """Rounds have no average."""

    def on_result(self, result: SiteResult, staleness: int) -> None:
        """Keep a reply until the round ends."""
        exchange = self._exchange
        if exchange is not None and exchange.awaits(result.facility):
            sent = exchange.sent[result.facility]
            exchange.replies[result.facility] = Message(result.message.content, reply_to=sent)

    def on_failure(self, failure: Failure) -> None:
        """Wait for a site no longer."""
        if self._exchange is not None and self._exchange.awaits(failure.facility):
            self._exchange.reasons[failure.facility] = failure.reason

    def wake_at(self) -> float | None:
        """Return when the round is over: now, if nobody is left to wait for."""
        exchange, now = self._exchange, self._engine.now()
        if exchange is not None:
            return now if exchange.complete() else exchange.until
        if self._gives_up_at is None:
            self._gives_up_at = now + self._settings.offline_grace_s
        return self._gives_up_at

    def on_wake(self) -> NewWeights | None:
        """Aggregate what has arrived."""
        exchange, self._exchange, self._gives_up_at = self._exchange, None, None
        for facility in exchange.waiting if exchange else ():
            self._engine.abandon(facility)
        if not self.trained:
            return self._aggregate_train(exchange)
        self._aggregate_evaluate(exchange)
        return None

    def counts(self, result: SiteResult, staleness: int) -> bool:
        """Every reply counts."""
        return True

    def sites_needed(self) -> int:
        """Return how many sites a round needs; fewer, and Flower's sampling would hang."""
        keys = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
        own = [getattr(strategy, key, 0) for strategy in self._layers() for key in keys]
        return max([self._settings.min_sites, *own])

    def pending(self) -> Iterable[str]:
        """No reply waits for a later round."""
        return ()

    def published(self) -> ArrayRecord:
        """Return the newest weights."""
        return self.arrays

    def evaluation_arrays(self) -> ExtraArrays:
        """Return nothing: rounds send weights alone."""
        return {}

    def reported_weight(self, facility: str, staleness: int, updates: int) -> float:
        """Return the weight of a site in the newest version."""
        return self._weights.get(facility, 0.0)

    def adapter_facts(self) -> dict[str, Any]:
        """Return what is to tell of the adapters in the newest version."""
        return self._adapter_facts

    def summary(self) -> None:
        """Log the settings."""
        self.strategy.summary()

    def final_metrics(self, replies: Iterable[Message]) -> MetricRecord:
        """Return the metrics of the last evaluation, if the strategy has a way to."""
        own = getattr(self.strategy, "final_metrics", None)
        return own(replies) if callable(own) else MetricRecord()

    def save(self) -> dict[str, Any]:
        """Return the round and the strategy's state, as JSON."""
        return {
            "tensors": self._saved["tensors"],
            "strategy": self._saved,
            "round": self.round,
            "trained": self.trained,
            "failed": self.failed,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `save`."""
        self.round, self.trained, self.failed = state["round"], state["trained"], state["failed"]
        self._saved = state["strategy"]
        load_strategy(self.strategy, self._engine.runtime.checkpoints, self._saved)

    # ---- a round ----------------------------------------------------------------------------

    def _open(self) -> _Exchange | None:
        """Return the exchange under way, or begin it as soon as there are enough sites."""
        if self._exchange is not None or len(self._engine.reachable()) < self.sites_needed():
            return self._exchange
        kind: OrderKind = "evaluate" if self.trained else "train"
        number = self.round if self.trained else self.round + 1
        config = self._configs[self.trained]
        configure = self.strategy.configure_evaluate
        if kind == "train":
            log.info("[ROUND %d/%d]", number, self._rounds)
            configure = self.strategy.configure_train
        # A strategy that samples sites samples the same ones after a resume.
        random.seed(f"{self._engine.runtime.run_key}:{number}:{kind}")
        sent = list(configure(number, self.arrays, config, self._grid.fresh()))
        until = None if self._deadline_s is None else self._engine.now() + self._deadline_s
        self._exchange, self._gives_up_at = _Exchange(until), None
        for message in sent:
            facility = self._engine.facility_of.get(message.metadata.dst_node_id)
            if facility is not None and facility not in self._exchange.sent:
                self._exchange.sent[facility] = message
                self._exchange.plans[facility] = self._plan(message, kind)
        return self._exchange

    def _plan(self, message: Message, kind: OrderKind) -> Plan:
        content = _frozen(message.content)
        options = messages.options_of(content)
        steps = int(options.pop("steps", 0))
        arrays = next(iter(content.array_records.values()), self.arrays)
        binding = Binding(self.version, arrays)
        return Plan(
            kind=kind,
            steps=steps if kind == "train" else 0,
            options=options,
            content=content,
            bind=lambda running: binding,
            checked=hasattr(self.strategy, "stored"),
        )

    def _aggregate_train(self, exchange: _Exchange | None) -> NewWeights | None:
        replies = exchange.answers(self._layers(), trained=True) if exchange else []
        self._reasons = exchange.reasons if exchange else {}
        good = [r for r in replies if r.has_content()]
        self.round, self.trained = self.round + 1, True
        arrays: Mapping[str, Any] | None = None
        if not replies or len(good) >= self._settings.min_sites:
            arrays, metrics = aggregate(self.strategy, self.round, replies)
            if metrics is not None:
                self._history.result.train_metrics_clientapp[self.round] = metrics
        self._save_strategy()
        if arrays:
            self.failed = 0
            self.stored = getattr(self.strategy, "stored", None)
            self._weights = shares_of(self.strategy, good, self._engine.facility_of)
            average = average_of(self.strategy, good, self._weights)
            self._adapter_facts = facts(average, arrays)
        elif replies or exchange is None:
            self._count_failure()
        return arrays or None

    def _aggregate_evaluate(self, exchange: _Exchange | None) -> None:
        self.trained = False
        if exchange is not None:
            metrics = self.strategy.aggregate_evaluate(
                self.round, exchange.answers(self._layers(), trained=False)
            )
            if metrics is not None:
                self._history.result.evaluate_metrics_clientapp[self.round] = metrics
        self._history.evaluate(self.round, self.arrays)

    def _count_failure(self) -> None:
        """Go on with the weights unchanged, but not for ever."""
        self.failed += 1
        log.warning("round %d brought no new weights", self.round)
        if self.failed >= self._settings.max_failed_rounds:
            causes = "; ".join(f"{f}: {r}" for f, r in sorted(self._reasons.items()))
            raise RunFailed(
                f"{self.failed} rounds in a row brought too few results "
                f"(needed {self.sites_needed()}). Last: {causes or 'no site was reachable'}"
            )

    def _save_strategy(self) -> None:
        store = self._engine.runtime.checkpoints
        self._saved = save_strategy(self.strategy, store, str(self.round))

    # ---- what the strategy is ---------------------------------------------------------------

    def _layers(self) -> Iterator[Strategy]:
        """Yield the strategy and, if it wraps another one (differential privacy), those within."""
        strategy: Any = self.strategy
        while isinstance(strategy, Strategy):
            yield strategy
            strategy = getattr(strategy, "strategy", None)


def _frozen(content: RecordDict) -> RecordDict:
    """Copy the configs: Flower's strategies write the next round's number into the same one."""
    return RecordDict(
        {k: ConfigRecord(dict(v)) if isinstance(v, ConfigRecord) else v for k, v in content.items()}
    )


class OnlineSitesGrid(Grid):
    """Lists one node per facility that is online, or was within the grace.

    Flower's strategies sample from it; the engine does the sending.
    """

    def __init__(self, grid: Grid, engine: Engine) -> None:
        self._grid = grid
        self._engine = engine
        self._asked = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return node ids, ordered by facility."""
        self._asked += 1
        if self._asked > PATIENCE:
            self._engine.discover()
        return [site.node_id for site in self._engine.reachable()]

    def fresh(self) -> OnlineSitesGrid:
        """Return this grid for another call of a hook."""
        self._asked = 0
        return self

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)
