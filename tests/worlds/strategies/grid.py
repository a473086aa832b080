"""A Flower Grid in one process and virtual time, with scripted sites.

Everything is computed when a message is pushed: a site answers one message at a time, its
allocation waits in a queue, loads, and trains so many seconds per step. No threads, no sleep.
Faults are scripted per node: offline intervals, restarts as another node, lost messages, error
replies, refused pushes, duplicated replies, weights with NaN.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from worlds.strategies.toy_model import NAMES, array, as_numpy, initial_arrays, pull_towards

from flwr_hpc import protocol
from flwr_hpc.protocol import Order, Result, Status


class VirtualClock:
    """Time that passes in `sleep` alone; past `limit` somebody waits for ever."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.t = 0.0
        self.limit = limit

    def now(self) -> float:
        return self.t

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        assert self.t < self.limit, "nothing will ever happen again"
        self.t += seconds


@dataclass
class FakeSite:
    """A facility with a launcher, or (`plain`) an ordinary ClientApp."""

    name: str
    target: float = 0.0
    queue_s: float = 0.0
    load_s: float = 0.0
    step_s: float = 1.0
    examples: int = 10
    plain: bool = False
    fail: Status | None = None  # answers every ACQUIRE and order with this
    most_steps: int | None = None  # an order ends there, as with the walltime
    spoil: Callable[[RecordDict], None] | None = None  # what it does to its results
    cancels: int = 0  # so many jobs are cancelled at work; what they trained is lost
    extra_metrics: dict[str, float] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)  # order id -> how often
    orders: list[Order] = field(default_factory=list)
    gradients: dict[str, dict] = field(default_factory=dict)  # order id -> mean over its steps
    finish: dict[str, tuple[float, Order, dict]] = field(default_factory=dict)
    alloc_ready: float | None = None
    alloc_busy: float = 0.0
    alloc_number: int = 0
    cancelled: int = 0
    released: int = 0

    def answer(self, message: Message, now: float) -> tuple[float, RecordDict | Error]:
        """Return when and what this site answers to a message that it begins to handle now."""
        kind = message.metadata.message_type
        if self.plain:
            return self._plain(message, now)
        if kind == protocol.DESCRIBE:
            runs = self.alloc_ready is not None and self.alloc_ready <= now
            return now, self._status(Status("ready" if runs else "idle"))
        if kind == protocol.RELEASE:
            self.alloc_ready = None
            self.released += 1
            self.cancelled += bool(message.content.get(protocol.WAIT, {}).get("cancel"))
            return now, self._status(Status("idle"))
        if self.fail is not None:
            return now, self._status(self.fail)
        wait_s = float(message.content[protocol.WAIT]["wait_s"])
        ready = self._allocate(now)
        if kind == protocol.ACQUIRE:
            state = "ready" if ready <= now + wait_s else "queued"
            return min(ready, now + wait_s), self._status(Status(state))
        order = protocol.from_json(Order, str(message.content[protocol.ORDER]["json"]))
        if kind != protocol.COLLECT:
            if order.merges is not None and self._before(order) not in self.finish:
                lacking = Result(order.id, "failed", error="no weights", refused=True)
                return now, self._status(Status("failed", order_id=order.id, result=lacking))
            self._hand_in(order, message, max(now, ready))
        return self._collect(order, now, wait_s)

    def _allocate(self, now: float) -> float:
        if self.alloc_ready is None:
            self.alloc_ready = now + self.queue_s + self.load_s
            self.alloc_number += 1
        return self.alloc_ready

    def _hand_in(self, order: Order, message: Message, begin: float) -> None:
        if order.id in self.finish:  # idempotent: the order re-attaches
            return
        begin = max(begin, self.alloc_busy)
        self.alloc_busy = begin + max(1, self._steps(order)) * self.step_s
        self.trained[order.id] = self.trained.get(order.id, 0) + 1
        self.orders.append(order)
        self.finish[order.id] = (self.alloc_busy, order, self._work(order, message))

    def _steps(self, order: Order) -> int:
        """Return how many steps of an order are trained."""
        if order.kind != "train":
            return 1
        return order.steps if self.most_steps is None else min(order.steps, self.most_steps)

    def _work(self, order: Order, message: Message) -> dict[str, np.ndarray]:
        if order.kind == "initialize":
            return as_numpy(initial_arrays())
        weights = as_numpy(message.content.get(protocol.ARRAYS, {}))
        if order.kind == "evaluate":
            return weights
        if order.merges is not None:
            weights = self._merged(order, weights)
        steps = self._steps(order)
        if not steps:
            return weights
        zero = {k: np.zeros_like(w) for k, w in weights.items()}
        shift = as_numpy(message.content.get(protocol.CORRECTION, {})) or zero
        ahead = {k: w + shift[k] for k, w in weights.items()}  # the gradient is w - target + shift
        trained = {k: w - shift[k] for k, w in pull_towards(self.target)(ahead, steps).items()}
        if order.options.get(protocol.MEAN_GRADIENT):
            self.gradients[order.id] = {
                k: (w - trained[k]) / w.dtype.type(0.1 * steps) - shift[k]
                for k, w in weights.items()
            }
        return trained

    def _before(self, order: Order) -> str:
        """Return the id of the order whose weights this one goes on from."""
        return dataclasses.replace(order, seq=order.options["after"]).id

    def _merged(self, order: Order, given: dict) -> dict[str, np.ndarray]:
        """Merge what came with an order into what the one before it has left here."""
        assert set(given) == set(order.merges)
        here, alpha = self.finish[self._before(order)][2], np.float32(order.options["alpha"])
        return {k: (1 - alpha) * given[k] + alpha * w if k in given else w for k, w in here.items()}

    def _collect(self, order: Order, now: float, wait_s: float) -> tuple[float, RecordDict]:
        if order.id not in self.finish:
            return now, self._status(Status("ready", order_id=order.id))
        done, order, weights = self.finish[order.id]
        if self.cancels > 0 and order.kind == "train":
            return self._cancel(order, now)
        if done > now + wait_s:
            step = int(order.steps - (done - now - wait_s) / self.step_s)
            running = Status("running", order_id=order.id, step=step, steps=order.steps, loss=1.0)
            return now + wait_s, self._status(running)
        return max(now, done), self._result(order, weights)

    def _cancel(self, order: Order, now: float) -> tuple[float, RecordDict]:
        """Lose an allocation and the order it works on."""
        self.cancels -= 1
        del self.finish[order.id], self.trained[order.id]
        self.alloc_ready, self.alloc_busy = None, now
        lost = Status("failed", order_id=order.id, error="its job was cancelled")
        return now + self.step_s, self._status(lost)

    def _result(self, order: Order, weights: dict[str, np.ndarray]) -> RecordDict:
        metrics = {"train_loss": 1.0, **self.extra_metrics}
        if order.evaluate or order.kind == "evaluate":
            metrics["held_out_loss"] = float(np.square(weights[NAMES[0]]).mean())
        files = {"config.json": "{}"} if order.kind == "initialize" else {}
        steps = self._steps(order) if order.kind == "train" else order.steps
        seconds = {"train": steps * self.step_s}
        result = Result(
            order.id, "done", steps, 100, self.examples, metrics, "w", "", files, seconds
        )
        content = self._status(Status("done", order_id=order.id, result=result))
        content[protocol.METRICS] = MetricRecord({protocol.WEIGHT_KEY: self.examples, **metrics})
        if order.kind != "evaluate":
            names = weights if order.returns is None else order.returns
            content[protocol.ARRAYS] = ArrayRecord({k: array(weights[k]) for k in names})
            if order.id in self.gradients:
                means = self.gradients[order.id]
                content[protocol.GRADIENT] = ArrayRecord({k: array(g) for k, g in means.items()})
        if self.spoil is not None and order.kind == "train":
            self.spoil(content)
        return content

    def _status(self, status: Status) -> RecordDict:
        allocation = "" if self.alloc_ready is None else f"{self.name}-{self.alloc_number}"
        queued_s = self.queue_s * self.alloc_number
        named = {"facility": self.name, "allocation": allocation, "queued_s": queued_s}
        full = Status(**{**vars(status), **named})
        return RecordDict({protocol.STATUS: ConfigRecord({"json": protocol.to_json(full)})})

    def _plain(self, message: Message, now: float) -> tuple[float, RecordDict | Error]:
        kind = message.metadata.message_type
        if kind not in ("train", "evaluate"):
            return now, Error(2, f"ValueError: No query function registered with name '{kind}'")
        weights = as_numpy(next(iter(message.content.array_records.values())))
        config = next(iter(message.content.config_records.values()), {})
        metrics = MetricRecord({protocol.WEIGHT_KEY: self.examples, "loss": 1.0 + self.target})
        done = now + self.step_s
        if kind == "evaluate":
            return done, RecordDict({"metrics": metrics})
        trained = pull_towards(self.target)(weights, int(config.get("steps", 1)))
        arrays = ArrayRecord({k: array(w) for k, w in trained.items()})
        return done, RecordDict({"arrays": arrays, "metrics": metrics})


@dataclass
class _Reply:
    at: float
    message: Message
    node_id: int


class FakeGrid(Grid):
    """The SuperLink and its nodes. `violations` lists what must never happen."""

    def __init__(self, sites: Iterable[FakeSite], clock: VirtualClock | None = None) -> None:
        name_this_process()
        self.clock = clock or VirtualClock()
        self.nodes: dict[int, FakeSite] = {}
        self.offline: dict[int, list[tuple[float, float]]] = {}
        self.free_at: dict[int, float] = {}
        self.lose: dict[str, int] = {}  # message type -> how many replies are lost
        self.errors: dict[str, list[int]] = {}  # message type -> codes of error replies
        self.refuse = 0  # pushes answered with ""
        self.duplicate = False
        self.violations: list[str] = []
        self.settled: dict[str, int] = {}  # facility -> below which number, by the server's word
        self.pushed: list[Message] = []
        self._pending: dict[str, _Reply] = {}
        self._receiver: dict[str, int] = {}
        self._restarted: set[int] = set()
        self._ids = itertools.count(1)
        self._node_ids = itertools.count(101)
        for site in sites:
            self.join(site)

    def join(self, site: FakeSite) -> int:
        node_id = next(self._node_ids)
        self.nodes[node_id] = site
        return node_id

    def node_of(self, name: str) -> int:
        return max(n for n, s in self.nodes.items() if s.name == name)

    def away(self, name: str, begin: float, end: float = float("inf")) -> None:
        """Take a node off the network for a while."""
        self.offline.setdefault(self.node_of(name), []).append((begin, end))

    def restart(self, name: str, *, at: float | None = None) -> int:
        """Replace a SuperNode by another node: what it was handling is lost."""
        old = self.node_of(name)
        now = self.clock.now() if at is None else at
        self.offline.setdefault(old, []).append((now, float("inf")))
        lost = [i for i, r in self._pending.items() if r.node_id == old and r.at > now]
        for message_id in lost:
            del self._pending[message_id]
        return self.join(self.nodes[old])

    def come_back(self, name: str) -> None:
        """Start a SuperNode anew as the same node: what it was handling is lost."""
        node_id, now = self.node_of(name), self.clock.now()
        for message_id in [i for i, r in self._pending.items() if r.node_id == node_id]:
            if self._pending[message_id].at > now:
                del self._pending[message_id]
        self.free_at.pop(node_id, None)
        self._restarted.add(node_id)

    def restarted(self) -> set[int]:
        """Return the nodes that came back since the last call."""
        nodes, self._restarted = self._restarted, set()
        return nodes

    def new_run(self) -> None:
        """Begin another Flower run: messages of the last one are gone, the sites' jobs are not."""
        self._pending.clear()
        self.free_at.clear()

    def is_online(self, node_id: int) -> bool:
        now = self.clock.now()
        return not any(a <= now < b for a, b in self.offline.get(node_id, []))

    # ---- Flower's Grid ----------------------------------------------------------------------

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [n for n in self.nodes if self.is_online(n)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(m) for m in messages]

    def _push(self, message: Message) -> str:
        node_id, kind = message.metadata.dst_node_id, message.metadata.message_type
        if self.refuse > 0:
            self.refuse -= 1
            return ""
        if not self.is_online(node_id):
            return ""
        flying = [r for r in self._pending.values() if r.node_id == node_id]
        if any(r.at > self.clock.now() for r in flying) and kind != protocol.RELEASE:
            self.violations.append(f"two messages in flight to node {node_id}")
        self._hold_to_its_word(message)
        message_id = f"m{next(self._ids)}"
        message.metadata.__dict__["_message_id"] = message_id
        self.pushed.append(message)
        self._receiver[message_id] = node_id
        begin = max(self.clock.now(), self.free_at.get(node_id, 0.0))
        if self.lose.get(kind, 0) > 0:
            self.lose[kind] -= 1
            return message_id
        codes = self.errors.get(kind, [])
        at, content = (begin, Error(codes.pop(0), "scripted")) if codes else (None, None)
        if content is None:
            # The network copies; a site never sees the server's own objects.
            at, content = self.nodes[node_id].answer(copy.deepcopy(message), begin)
        self.free_at[node_id] = at
        self._pending[message_id] = _Reply(at, Message(content, reply_to=message), node_id)
        return message_id

    def _hold_to_its_word(self, message: Message) -> None:
        """Note a question for an order of which the server said that it is settled."""
        if protocol.ORDER in message.content:
            order = protocol.from_json(Order, str(message.content[protocol.ORDER]["json"]))
            settled = self.settled[order.facility] = max(
                order.settled, self.settled.get(order.facility, 0)
            )
            if order.seq < settled:
                self.violations.append(f"{order.id} was settled")

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for message_id in message_ids:
            if not self.is_online(self._receiver[message_id]):
                self.violations.append(f"polled the offline node {self._receiver[message_id]}")
                self._pending.pop(message_id, None)
                continue
            reply = self._pending.get(message_id)
            if reply is None or reply.at > self.clock.now():
                continue
            del self._pending[message_id]
            replies += [reply.message] * (2 if self.duplicate else 1)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        ids = set(self.push_messages(messages))
        replies: list[Message] = []
        while ids:
            found = self.pull_messages(sorted(ids))
            ids -= {m.metadata.reply_to_message_id for m in found}
            replies += found
            self.clock.sleep(1.0)
        return replies


def name_this_process() -> None:
    """Do what Flower does when it starts a process; without it no Message can be made."""
    identity = Message.__init__.__globals__["TaskIdentity"]
    identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
