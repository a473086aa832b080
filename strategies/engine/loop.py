"""The event loop: whoever drives it, our strategies, Flower's hooks or the last evaluation.

Once, for all of them: sites are kept busy, what arrives is made durable, an empty result never
weighs, new weights are checked before they are a version, failing sites rest, and a run that
cannot go on ends with the reasons.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Result

from flwr_hpc.protocol import Order
from strategies.base.persistence import forget_metrics, load_result, result_state
from strategies.engine import messages
from strategies.engine.engine import Engine, global_name
from strategies.engine.runtime import RunFailed
from strategies.engine.state import Binding, Event, Failure, Plan, SiteResult, SiteState
from strategies.engine.troubles import Troubles
from strategies.engine.validate import NewWeights, check_version, shapes_of
from strategies.parts.rules import tensors

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]

# A site that is offline for so long does not evaluate the last version: Flower has not seen it for
# two minutes then, and a SuperNode that is started again is back sooner.
ABSENT_S = 60.0
KEPT_METRICS = 1000  # versions: a run may make many more, and saves them with every order

log = logging.getLogger("strategies")


@runtime_checkable
class Driver(Protocol):
    """What the loop asks, and tells; see `strategies.base.asynchronous.AsyncStrategy`."""

    version: int
    arrays: ArrayRecord
    num_sites: int  # reachable ones, kept up to date by the loop
    rests: Callable[[str], bool]  # whether a site has failed and is left alone for a while
    # Results live in memory until a round ends: their orders stay open until then. A site that
    # failed is asked again when the driver plans for it, without a rest.
    in_rounds: bool
    stored: ArrayRecord | None  # new weights that are in the checkpoint store already

    def configure(self, train_config: ConfigRecord) -> None: ...
    def begin(self, engine: Engine, versions: int) -> None: ...
    def finished(self) -> bool: ...
    def next_version(self) -> int: ...
    def fill(self, plan: Plan) -> Plan: ...
    def plan(self, site: SiteState) -> Plan | None: ...
    def plan_next(self, site: SiteState) -> Plan | None: ...
    def resume(self, order: Order) -> Plan | None: ...
    def observe(self, result: SiteResult) -> None: ...
    def on_result(self, result: SiteResult, staleness: int) -> NewWeights | None: ...
    def on_version(self, former: ArrayRecord, updates: int) -> None: ...
    def on_failure(self, failure: Failure) -> None: ...
    def wake_at(self) -> float | None: ...
    def on_wake(self) -> NewWeights | None: ...
    def counts(self, result: SiteResult, staleness: int) -> bool: ...
    def sites_needed(self) -> int: ...  # with fewer it can make no version
    def pending(self) -> Iterable[str]: ...
    def published(self) -> ArrayRecord: ...
    def evaluation_arrays(self) -> Mapping[str, Any]: ...  # beside the newest version's weights
    def reported_weight(self, facility: str, staleness: int, updates: int) -> float: ...
    def adapter_facts(self) -> dict[str, Any]: ...  # with the version; see `parts.lora.adapters`
    def save(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...
    def summary(self) -> None: ...
    def final_metrics(self, replies: Iterable[Message]) -> MetricRecord: ...


class History:
    """The metrics of a run, and the evaluation at the server."""

    def __init__(self, evaluate_fn: EvaluateFn | None) -> None:
        self.result = Result()
        self._evaluate_fn = evaluate_fn
        self._saved: dict[str, Any] = {}

    def evaluate(self, number: int, arrays: ArrayRecord) -> None:
        """Evaluate weights here, if anybody wants that."""
        metrics = self._evaluate_fn(number, arrays) if self._evaluate_fn else None
        if metrics is not None:
            self.result.evaluate_metrics_serverapp[number] = metrics

    def save(self) -> dict[str, Any]:
        """Return the metrics as JSON."""
        self._saved = result_state(self.result, self._saved)
        return self._saved

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `save`; whoever holds `result` sees it."""
        vars(self.result).update(vars(load_result(state)))


class EventLoop:
    """Drives a run over the engine.

    Parameters
    ----------
    driver : Driver
    engine : Engine
    history : History
    source : str
        The strategy's name, for messages.
    """

    def __init__(self, driver: Driver, engine: Engine, history: History, source: str) -> None:
        self.driver = driver
        self.engine = engine
        self.history = history
        self.runtime = engine.runtime
        self.settings = engine.runtime.settings
        self.troubles = Troubles(engine)
        self._source = source
        self._entries: list[dict[str, Any]] = []  # of results that are in no version yet
        self._trains = False  # somebody was asked to

    # ---- beginning and checkpoint -----------------------------------------------------------

    def begin(self, initial: ArrayRecord, versions: int) -> None:
        """Restore, or make the initial weights version 0."""
        store, state, driver = self.runtime.checkpoints, self.engine.restored, self.driver
        driver.begin(self.engine, versions)
        driver.rests = self.troubles.rests
        driver.num_sites = max(1, self.engine.num_reachable)
        if state is None:
            driver.summary()
            driver.arrays = store.put(global_name(0), tensors(initial))
            self.history.evaluate(0, driver.published())
            self.engine.settle()
        else:
            driver.version = state["version"]
            driver.arrays = store.get(global_name(driver.version))
            driver.load(state["strategy"])
            self.history.load(state["result"])
            self.troubles.load(state["troubles"])
            self._entries, self._trains = state["window"], state["trains"]
            log.info("resumed with version %d", driver.version)
        self._shapes = shapes_of(driver.arrays)
        self._save()

    def _save(self) -> None:
        self._note()
        self.engine.commit()

    def _note(self) -> None:
        version = self.driver.version
        own = self.driver.save()
        state = {
            "version": version,
            "round": own.get("round", version),
            "window": [] if self.driver.in_rounds else self._entries,
            "result": self.history.save(),
            "strategy": own,
            "troubles": self.troubles.save(),
            "trains": self._trains,
        }
        self.engine.note(state, [global_name(version), *own["tensors"]])

    # ---- the loop ---------------------------------------------------------------------------

    def run(self) -> Result:
        """Go on until the driver has finished; then have the last version evaluated."""
        driver, result = self.driver, self.history.result
        while not driver.finished():
            self.engine.resume(driver.resume)
            self._keep_busy(driver)
            self._take(self.engine.events())
            driver.num_sites = max(1, self.engine.num_reachable)
            if not driver.finished():
                self.engine.require(driver.sites_needed())
            self.troubles.check(failures=not driver.in_rounds)
        if self._trains and driver.version == 0:
            raise RunFailed(
                f"the run ended without a single new version. {self.troubles.reasons()}"
            )
        result.arrays = driver.arrays
        if replies := self._evaluate_last():
            number = driver.next_version() if driver.in_rounds else driver.version
            metrics = driver.final_metrics(replies)
            result.evaluate_metrics_clientapp.setdefault(number, metrics)
        return result

    def _keep_busy(self, driver: Driver) -> None:
        """Give everybody something to do who has nothing, as far as there is."""
        asked = False
        for facility, site in sorted(self.engine.sites.items()):
            busy = self.engine.busy(facility)
            if site.refusal or (busy and not self.engine.due_prefetch(facility)):
                continue
            if not driver.in_rounds and (not site.online or self.troubles.rests(facility)):
                continue
            plan = driver.plan_next(site) if busy else driver.plan(site)
            if plan is not None:
                asked = True
                self._trains |= plan.kind == "train"
                filled = driver.fill(plan)
                self.engine.request(facility, self._noting(filled) if plan.bind else filled)
        if asked:
            self._note()  # the engine commits it ahead of sending the orders

    def _noting(self, plan: Plan) -> Plan:
        """Commit what a driver notes as an order is submitted together with the order."""
        bind = plan.bind
        if bind is None or self.driver.in_rounds:
            return plan

        def noted(running: Order | None) -> Binding:
            binding = bind(running)
            self._note()
            return binding

        return dataclasses.replace(plan, bind=noted)

    def _take(self, events: list[Event]) -> None:
        """Take in what has come, and make it durable: none is lost or counted twice."""
        driver, made, changed = self.driver, [], False
        for event in events:
            if driver.finished():
                self.engine.settle(event.facility)
                continue
            if isinstance(event, Failure):
                self._failed(event)
            else:
                made.append(self._arrived(event))
            if not driver.in_rounds:
                self.engine.settle(event.facility)
                changed = True
        due = driver.wake_at()
        if due is not None and due <= self.engine.now() and not driver.finished():
            made.append(self._new_version(driver.on_wake(), "on_wake"))
            if driver.in_rounds:
                self.engine.settle()
                self._entries = []
            changed = True
        if changed:
            self._save()
        for version in made:
            if version is not None:
                self.runtime.emit("aggregated", **version)

    def _failed(self, failure: Failure) -> None:
        self.driver.on_failure(failure)
        pause = self.troubles.failed(failure.facility, failure.reason)
        if failure.fatal:
            log.error("%s is left out of the run: %s", failure.facility, failure.reason)
            return
        log.warning("%s failed: %s; next try in %.0f s", failure.facility, failure.reason, pause)

    def _arrived(self, result: SiteResult) -> Mapping[str, Any] | None:
        """Take a result in; returns what there is to tell of the version it made, if any."""
        driver, order = self.driver, result.order
        if order.kind == "train":
            if useless := self._useless(result):
                self.troubles.useless(result.facility, useless)
                driver.on_failure(Failure(result.facility, order.kind, useless, order.id))
                return None
            self.troubles.clear(result.facility)
        elif not driver.in_rounds:
            return None
        staleness = driver.version - order.version
        if order.kind == "train" and driver.counts(result, staleness):
            self._entries.append(_entry(result))
        driver.observe(result)
        return self._new_version(driver.on_result(result, staleness), "on_result")

    def _useless(self, result: SiteResult) -> str:
        """Return why a result must not weigh, if so."""
        if result.empty:
            return "it trained no step"
        steps = result.order.steps
        if not self.settings.partial_work and result.steps < steps:
            return f"it trained {result.steps} of {steps} steps, and partial_work is off"
        return ""

    # ---- versions ---------------------------------------------------------------------------

    def _new_version(self, new: NewWeights | None, method: str) -> Mapping[str, Any] | None:
        """Check and store new weights; returns what there is to tell of them."""
        driver = self.driver
        if new is None:
            return None
        before, former, number = driver.version, driver.arrays, driver.next_version()
        self._store(global_name(number), new, f"{self._source}.{method}")
        driver.version = number
        taken = self._take_entries()
        driver.on_version(former, len(taken))
        if driver.finished() and driver.published() is not driver.arrays:
            published = driver.published()  # the last version is what the strategy publishes
            self._store(global_name(number), published, f"{self._source}.published")
        told = self._told(taken, before)
        if not driver.in_rounds:
            metrics = messages.mean_metrics([e["metrics"] for e in taken])
            if metrics is not None:
                self.history.result.train_metrics_clientapp[number] = metrics
            forget_metrics(self.history.result, number - KEPT_METRICS)
            self.history.evaluate(number, driver.published())
        return {"version": number, **told, **driver.adapter_facts()}

    def _store(self, name: str, new: NewWeights, source: str) -> None:
        driver = self.driver
        if driver.stored is not None and new is driver.stored:
            driver.arrays = driver.stored
        else:
            pairs = check_version(new, self._shapes, source)
            driver.arrays = self.runtime.checkpoints.put(name, pairs)

    def _take_entries(self) -> list[dict[str, Any]]:
        """Return and forget the entries of what went into the version, not into a later one."""
        later = set(self.driver.pending())
        taken = [e for e in self._entries if e["order"] not in later]
        self._entries = [e for e in self._entries if e["order"] in later]
        return taken

    def _told(self, taken: list[dict[str, Any]], version: int) -> dict[str, Any]:
        """Return what is told of who is in the version made from the weights of `version`."""
        staleness: dict[str, int] = {}
        weights: dict[str, float] = {}
        for entry in taken:
            name, age = entry["facility"], version - entry["version"]
            staleness[name] = max(staleness.get(name, 0), age)
            weights[name] = weights.get(name, 0.0) + self.driver.reported_weight(
                name, age, len(taken)
            )
        return {"facilities": sorted(weights), "staleness": staleness, "weights": weights}

    # ---- the end ----------------------------------------------------------------------------

    def _evaluate_last(self) -> list[Message]:
        """Evaluate the last version at every site that is online and has not done so.

        Returns
        -------
        list of Message
            The replies by ``Settings.final_evaluation_s``; a site that fails is left out.
        """
        engine, version, arrays = self.engine, self.driver.version, self.driver.arrays
        until = engine.now() + self.settings.final_evaluation_s
        extra, bound = self.driver.evaluation_arrays(), Binding(version, arrays)
        plan = Plan(kind="evaluate", extra_arrays=extra, bind=lambda running: bound)
        able = [s for s in engine.sites.values() if s.online and not s.refusal]
        lacking = [s for s in able if s.evaluated != version]
        waiting = {site.facility for site in lacking if engine.now() < until}
        for facility in sorted(waiting):
            if engine.busy(facility):
                engine.abandon(facility)
        engine.resume(lambda order: plan if _evaluates(order, version) else None)
        for facility in sorted(waiting):
            if not engine.busy(facility):
                engine.request(facility, plan)
        replies: list[Message] = []
        while waiting and engine.now() < until:
            for event in engine.events():
                if isinstance(event, SiteResult) and event.order.kind == "evaluate":
                    replies.append(event.message)
                waiting.discard(event.facility)
                engine.settle(event.facility)
            waiting -= self._gone(waiting)
        for facility in waiting:
            log.warning("%s did not evaluate the last version in time", facility)
            engine.abandon(facility)
        engine.settle()
        engine.commit()
        return replies

    def _gone(self, waiting: set[str]) -> set[str]:
        """Give up the sites that have been away for a while; nobody is waited for in vain."""
        reachable = {
            site.facility
            for site in self.engine.sites.values()
            if site.reachable(self.engine.now(), ABSENT_S)
        }
        gone = waiting - reachable
        for facility in sorted(gone):
            log.warning("%s went offline before it evaluated the last version", facility)
            self.engine.abandon(facility)
        return gone


def _evaluates(order: Order, version: int) -> bool:
    return order.kind == "evaluate" and order.version == version


def _entry(result: SiteResult) -> dict[str, Any]:
    """Return what is told of a result with the version it goes into."""
    return {
        "facility": result.facility,
        "order": result.order.id,
        "version": result.order.version,
        "metrics": messages.flat_metrics(result.message),
    }
