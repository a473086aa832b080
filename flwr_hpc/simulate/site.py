"""A simulated site: answers the messages of a launcher, with allocations that are models.

It behaves as `flwr_hpc.site.client_app` over the allocation manager and a worker does: one message
at a time, long polls, idempotent orders, warm allocations that end with their walltime, partial
results, preempted orders that go on where they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from flwr_hpc import protocol
from flwr_hpc.protocol import Order, Result, Status
from flwr_hpc.simulate.allocation import Allocation, Task
from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.facility import Facility
from flwr_hpc.simulate.learning.base import Learner, Weights
from flwr_hpc.simulate.pool import Pool
from flwr_hpc.simulate.queues.models import Queue

KEPT = 2  # finished orders that can be collected again


@dataclass
class _Waiting:
    """A message that is held until something is true."""

    message: Message
    answer: Callable[[RecordDict], None]
    until: float
    order_id: str = ""


class SimulatedSite:
    """One facility's login node, queue and allocations.

    Parameters
    ----------
    name, index : str, int
        Of the facility; the index selects its data.
    facility : Facility
    queue : Queue
    learner : Learner
    clock : VirtualClock
    rng : numpy Generator
        Draws preemptions and failures.
    retries : int
        Failures of one order before it is reported as failed.

    Attributes
    ----------
    pool : Pool
        Its allocations.
    steps : int
        Trained so far.
    """

    def __init__(
        self,
        name: str,
        index: int,
        facility: Facility,
        queue: Queue,
        learner: Learner,
        clock: VirtualClock,
        rng: np.random.Generator,
        retries: int = 2,
    ) -> None:
        self.name, self.index, self.facility = name, index, facility
        self.learner, self.clock = learner, clock
        self.pool = Pool(facility, queue, clock, rng, self._train, self._notify, retries)
        self.steps = 0
        self._bytes = sum(w.nbytes for w in learner.initial().values())
        self._tasks: dict[str, Task] = {}
        self._results: dict[str, RecordDict] = {}
        self._waiting: _Waiting | None = None

    # ---- messages ---------------------------------------------------------------------------

    def online(self) -> bool:
        """Return whether the site is up."""
        now = self.clock.now()
        return not any(a <= now < b for a, b in self.facility.outages)

    def handle(self, message: Message, answer: Callable[[RecordDict], None]) -> None:
        """Take a message; `answer` is called once, when its reply leaves the site."""
        kind = message.metadata.message_type
        if kind == protocol.RELEASE:
            self.pool.release()
            self._resume(self._waiting.order_id if self._waiting is not None else "")
        if kind == protocol.DESCRIBE:
            self.pool.attend(True)
            self.pool.attend(False)
            a = self.pool.current()
            ready = a is not None and a.state == "ready"
            answer(self._status("ready", a) if ready else self._status("idle"))
            return
        if kind == protocol.RELEASE:
            answer(self._status("idle"))
            return
        wait = message.content.get(protocol.WAIT)
        wait_s = float(str(wait["wait_s"])) if isinstance(wait, ConfigRecord) else float("inf")
        order_id = ""
        if protocol.ORDER in message.content:
            order = protocol.from_json(Order, str(message.content[protocol.ORDER]["json"]))
            order_id = order.id
            if kind != protocol.COLLECT:
                self._hand_in(order, message)
            self._resume(order_id)
        self._waiting = _Waiting(message, answer, self.clock.now() + wait_s, order_id)
        if wait_s < float("inf"):
            held = self._waiting
            self.clock.at(held.until, lambda: self._time_out(held))
        self.pool.attend(True)
        self._notify()

    def transfer_s(self, content: RecordDict) -> float:
        """Return how long arrays take one way: `Facility.transfer_s` is the whole model's time."""
        records = content.array_records.values()
        moved = sum(_nbytes(array) for record in records for array in record.values())
        return self.facility.transfer_s * (moved / self._bytes if moved else 1.0)

    def node_hours(self) -> float:
        """Return the node-hours so far, those of running allocations included."""
        return (self.pool.node_s + self.pool.running_node_s()) / 3600.0

    def _time_out(self, held: _Waiting | None) -> None:
        if held is not None and held is self._waiting:
            self._reply(self._progress(held))

    def _notify(self) -> None:
        """Answer the message that waits, if what it waits for has come."""
        for task in self._tasks.values():
            if task.finished and task.order.id not in self._results:
                self._results[task.order.id] = self._result(task)
        held = self._waiting
        if held is not None:
            self._answer_order(held) if held.order_id else self._answer_acquire()

    def _answer_acquire(self) -> None:
        self.pool.acquire()
        a = self.pool.current()
        if self._waiting is not None and a is not None and a.state == "ready":
            self._reply(self._status("ready", a))

    def _answer_order(self, held: _Waiting) -> None:
        order_id = held.order_id
        task = self._tasks.get(order_id)
        if task is None:
            self._reply(self._status("failed", error=f"order '{order_id}' is not known"))
        elif task.failed:
            why = task.failed
            result = Result(order_id, "failed", error=why, refused=task.refused)
            self._reply(self._status("failed", order_id=order_id, error=why, result=result))
            del self._tasks[order_id]
        elif task.finished:
            self._reply(self._results[order_id], upload=True)

    def _reply(self, content: RecordDict, upload: bool = False) -> None:
        held, self._waiting = self._waiting, None
        self.pool.attend(False)
        assert held is not None
        delay = self.facility.latency_s + (self.transfer_s(content) if upload else 0.0)
        self.clock.at(self.clock.now() + delay, lambda: held.answer(content))

    def _progress(self, held: _Waiting) -> RecordDict:
        task = self._tasks.get(held.order_id)
        a = self.pool.at_work_on(task) if task is not None else None
        if task is None or a is None:
            return self._status("queued", self.pool.current(), order_id=held.order_id)
        step = task.done + self.pool.steps_so_far(a)
        return self._status("running", a, order_id=held.order_id, step=step)

    def _status(self, state: Any, a: Allocation | None = None, **fields: Any) -> RecordDict:
        left = a.ends - self.clock.now() if a is not None and a.state == "ready" else None
        name = a.name if a is not None else ""
        status = Status(
            state,
            self.name,
            allocation=name,
            walltime_left_s=left,
            queued_s=self.pool.queued_s(),
            **fields,
        )
        return RecordDict({protocol.STATUS: ConfigRecord({"json": protocol.to_json(status)})})

    # ---- orders -----------------------------------------------------------------------------

    def _hand_in(self, order: Order, message: Message) -> None:
        if order.id in self._tasks:
            return
        correction = _tensors(message, protocol.CORRECTION)
        task = Task(order, _tensors(message, protocol.ARRAYS), correction=correction)
        self._tasks[order.id] = task
        for old in list(self._tasks)[: -KEPT - 1]:
            if self._tasks[old].finished:
                del self._tasks[old], self._results[old]
        self.pool.assign(task)

    def _resume(self, order_id: str) -> None:
        """Let somebody work on an order that is asked for, should its job have been released."""
        if order_id in self._tasks:
            self.pool.resume(self._tasks[order_id])

    def _train(self, task: Task, steps: int) -> None:
        if task.order.kind == "train" and steps > 0:
            options = task.order.options
            asked = bool(options.get(protocol.MEAN_GRADIENT))
            task.weights, loss = self.learner.train(
                self.index,
                task.weights,
                steps,
                float(options.get("lr-scale", 1.0)),
                float(options.get("proximal-mu", 0.0)),
                task.start,
                task.correction or None,
                task.gradients if asked else None,
            )
            self.steps += steps
            task.loss_sum += loss * steps
            task.done += steps
            if not math.isfinite(task.loss_sum):
                task.failed, task.refused = "training diverged", True
        elif task.order.kind == "initialize":
            task.weights = self.learner.initial()

    def _result(self, task: Task) -> RecordDict:
        order, done, here = task.order, task.done, self.pool.current()
        metrics = {"train_loss": task.loss_sum / done} if done else {}
        if task.share:
            metrics["local_update_share"] = task.share
            metrics["local_update_seq"] = float(task.own_seq)
        if order.kind == "evaluate":
            loss = self.learner.evaluate(task.weights)
            metrics |= {"held_out_loss": loss} if math.isfinite(loss) else {}
        seconds = {"train": done * self.facility.step_s}
        result = Result(
            order.id, "done", done, done, max(1, done), metrics, "weights", seconds=seconds
        )
        a = here if here is not None and here.state == "ready" else None
        content = self._status("done", a, order_id=order.id, result=result, steps=done)
        content[protocol.METRICS] = MetricRecord(
            {protocol.WEIGHT_KEY: max(1, done), "steps": done, **metrics}
        )
        if order.kind != "evaluate":
            names = task.weights if order.returns is None else order.returns
            content[protocol.ARRAYS] = _record({name: task.weights[name] for name in names})
        if task.gradients and done:
            means = {k: g / np.float32(done) for k, g in task.gradients.items()}
            content[protocol.GRADIENT] = _record(means)
        return content


def _tensors(message: Message, key: str) -> Weights:
    record = message.content.get(key)
    found = record.items() if isinstance(record, ArrayRecord) else ()
    return {name: array.numpy() for name, array in found}


def _nbytes(array: Array) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _record(tensors: Weights) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(tensor)) for name, tensor in tensors.items()})
