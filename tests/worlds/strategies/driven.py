"""An asynchronous strategy, driven by hand: who trains, arrives and fails is the test's choice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from worlds.strategies.grid import VirtualClock, name_this_process

from flwr_hpc.protocol import GRADIENT, TRAIN, Order, Result, Status
from strategies import AsyncStrategy, Failure, Plan, Runtime, SiteResult
from strategies.base.persistence import load_strategy, save_strategy
from strategies.engine.state import SiteState

THETA = {"w": [[10.0, -20.0], [30.0, 4.0]], "b": [5.0]}
Tensors = dict[str, np.ndarray]


def record(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({k: Array(np.asarray(v, dtype=np.float32)) for k, v in tensors.items()})


def theta() -> Tensors:
    """The initial weights, in the double precision of a hand computation."""
    return {k: np.array(v) for k, v in THETA.items()}


def delta(size: float, turn: float = 0.3) -> Tensors:
    """A pseudo-gradient; those of different `turn` point in different directions."""
    return {"w": size * np.array([[1.0, turn], [-turn, 0.5]]), "b": size * np.array([turn + 2.0])}


class Driven:
    """The loop's part, one call at a time, with the clock of the test."""

    def __init__(self, strategy: AsyncStrategy, sites: Iterable[str] = "abc", steps: int = 100):
        name_this_process()
        self.strategy, self.clock = strategy, VirtualClock()
        self.versions = 0
        self.orders: dict[str, tuple[Order, ArrayRecord, float]] = {}
        self.queued: dict[str, float] = {}
        self.counted: list[str] = []  # orders that are in no version yet
        strategy.runtime = Runtime(clock=self.clock)
        strategy.sites = {name: SiteState(name, True, k) for k, name in enumerate(sites)}
        strategy.num_sites = len(strategy.sites)
        strategy.default_steps = steps
        strategy.busy = lambda facility: facility in self.orders
        self._put(dict(strategy_arrays(theta())))

    @property
    def now(self) -> dict[str, np.ndarray]:
        return {k: a.numpy() for k, a in self.strategy.arrays.items()}

    def at(self, t: float) -> None:
        """Let time pass; what is due by then happens."""
        due = self.strategy.wake_at()
        while due is not None and due <= t:
            self.clock.t = max(self.clock.t, due)
            self.wake()
            again = self.strategy.wake_at()
            assert again is None or again > due, "a timer that fires without end"
            due = again
        self.clock.t = max(self.clock.t, t)

    def ask(self, name: str, ahead: bool = False) -> Plan | None:
        """Let a free site be planned for (`ahead`: a busy one), and hand its order in."""
        assert name not in self.orders
        plan_of = self.strategy.plan_next if ahead else self.strategy.plan
        plan = plan_of(self.strategy.sites[name])
        if plan is not None:
            steps = plan.steps or self.strategy.default_steps
            seq = self.queued.setdefault(f"seq {name}", 0)
            self.queued[f"seq {name}"] += 1
            options = dict(plan.options)
            version = self.strategy.version
            order = Order("k", name, int(seq), "train", version, steps, options=options)
            self.orders[name] = order, self.strategy.arrays, self.clock.t
        return plan

    def arrive(
        self,
        name: str,
        moved: Tensors,
        *,
        steps: int | None = None,
        tokens: int = 0,
        examples: int = 10,
        queued: float = 0.0,
        step_s: float = 1.0,
        gradient: Tensors | None = None,
        resumed: bool = False,
        **metrics: float,
    ) -> bool:
        """A site returns its weights minus `moved`; whether that made a version."""
        order, base, began = self.orders[name]
        done = order.steps if steps is None else steps
        trained = record({k: base[k].numpy() - d for k, d in moved.items()})
        self.queued[name] = self.queued.get(name, 0.0) + queued
        seconds = {"train": done * step_s}
        result = Result(order.id, "done", done, tokens, examples, metrics, "w", seconds=seconds)
        status = Status("done", name, result=result, queued_s=self.queued[name])
        content = {} if gradient is None else {GRADIENT: record(gradient)}
        reply = Message(RecordDict(content), 1, TRAIN)
        took_s = self.clock.t - began
        arrival = SiteResult(order, base, trained, metrics, reply, status, took_s, resumed)
        if arrival.empty:  # as the loop does
            self.strategy.on_failure(Failure(name, "train", "it trained no step", order.id))
            made = self.wake()
        else:
            staleness = self.strategy.version - order.version
            if self.strategy.counts(arrival, staleness):
                self.counted.append(order.id)
            self.strategy.observe(arrival)
            made = self._take(self.strategy.on_result(arrival, staleness))
        del self.orders[name]
        return made

    def save(self) -> dict[str, Any]:
        """Return what of the strategy would be committed now."""
        return save_strategy(self.strategy, self.strategy.runtime.checkpoints, "")

    def restore(self, other: Driven) -> None:
        """Go on, on another clock, from what another one has saved."""
        store = self.strategy.runtime.checkpoints = other.strategy.runtime.checkpoints
        load_strategy(self.strategy, store, json.loads(json.dumps(other.save())))
        self.orders = other.orders  # the engine has taken them up again

    def fail(self, name: str) -> None:
        del self.orders[name]
        self.strategy.on_failure(Failure(name, "train", "scripted"))

    def wake(self) -> bool:
        """Call `on_wake` if it is due; whether that made a version."""
        due = self.strategy.wake_at()
        return due is not None and due <= self.clock.t and self._take(self.strategy.on_wake())

    def _take(self, new: Any) -> bool:
        if new is None:
            return False
        self.strategy.version += 1
        former = self.strategy.arrays
        self._put(dict(new))
        later = [order_id for order_id in self.counted if order_id in set(self.strategy.pending())]
        self.strategy.on_version(former, len(self.counted) - len(later))
        self.counted = later
        return True

    def _put(self, tensors: Tensors) -> None:
        name = f"global-{self.strategy.version}"
        self.strategy.arrays = self.strategy.runtime.checkpoints.put(name, tensors.items())


def strategy_arrays(tensors: Tensors) -> Iterable[tuple[str, np.ndarray]]:
    return ((k, np.asarray(v, dtype=np.float32)) for k, v in tensors.items())


def close(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=2e-6, atol=1e-6, err_msg=name)


def minus(theta: Tensors, *terms: tuple[float, Tensors]) -> Tensors:
    """Return theta - sum of weight times delta, in double precision."""
    return {k: v - sum(w * d[k] for w, d in terms) for k, v in theta.items()}
