"""A simulated site whose queue, faults and learning are scripted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from worlds.strategies.driven import record
from worlds.strategies.grid import name_this_process

from flwr_hpc import protocol
from flwr_hpc.protocol import Order, Status
from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.facility import Facility
from flwr_hpc.simulate.queues.models import NoQueue, Ticket
from flwr_hpc.simulate.site import SimulatedSite

FOREVER = 1e9


class FixedWaits:
    """A queue whose waits are those of a list; the last one stays."""

    def __init__(self, clock: VirtualClock, *waits: float) -> None:
        self.clock, self.waits, self.submitted = clock, list(waits), 0

    def submit(self, ticket: Ticket) -> None:
        wait = self.waits[min(self.submitted, len(self.waits) - 1)]
        self.submitted += 1
        start = lambda: None if ticket.cancelled else ticket.start()  # noqa: E731
        self.clock.at(self.clock.now() + wait, start)

    def ended(self, ticket: Ticket) -> None: ...


class Counts:
    """A learner whose only weight counts the steps."""

    def initial(self) -> dict[str, Any]:
        return {"n": np.zeros(1, np.float32)}

    def train(
        self,
        site: int,
        weights: dict[str, Any],
        steps: int,
        lr_scale: float = 1.0,
        mu: float = 0.0,
        anchor: Any = None,
        correction: Any = None,
        gradients: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], float]:
        if gradients is not None:  # of a step: the correction, or 1 without one
            more = steps * (1.0 if correction is None else correction["n"])
            gradients["n"] = gradients.get("n", 0.0) + more
        return {k: w + np.float32(steps) for k, w in weights.items()}, 2.0

    def evaluate(self, weights: dict[str, Any]) -> float:
        return float(weights["n"][0])


class Scripted:
    """Waiting times until preemptions and failures, in the order they are drawn."""

    def __init__(self, *after: float) -> None:
        self.after = list(after)

    def exponential(self, mean: float) -> float:
        return self.after.pop(0) if self.after else FOREVER


class Site(SimulatedSite):
    """A site with a plain facility: a step of 1 s, 60 s to start, 10 s to write, 2 h walltime."""

    def __init__(self, *waits: float, faults: tuple[float, ...] = (), **facility: Any) -> None:
        name_this_process()
        clock = VirtualClock()
        queue = FixedWaits(clock, *waits) if waits else NoQueue()
        shape = Facility(**{"step_s": 1.0, "latency_s": 0.0, "transfer_s": 0.0, **facility})
        super().__init__("x", 0, shape, queue, Counts(), clock, Scripted(*faults))

    def ask(self, kind: str, order: Order | None = None, wait_s: float = FOREVER) -> Reply:
        content = RecordDict({protocol.WAIT: ConfigRecord({"wait_s": wait_s})})
        if order is not None:
            content[protocol.ORDER] = ConfigRecord({"json": protocol.to_json(order)})
            if kind != protocol.COLLECT:
                content[protocol.ARRAYS] = record({"n": np.zeros(1)})
        reply = Reply(self.clock)
        self.handle(Message(content, 1, kind), reply.take)
        return reply

    def train(self, steps: int, seq: int = 0, wait_s: float = FOREVER, version: int = 0) -> Reply:
        return self.ask(protocol.TRAIN, order(steps, seq, version), wait_s)

    def collect(self, steps: int, seq: int = 0, wait_s: float = FOREVER) -> Reply:
        return self.ask(protocol.COLLECT, order(steps, seq), wait_s)

    def until(self, done: Callable[[], bool], limit: float = 1e6) -> None:
        while not done():
            assert self.clock.now() < limit, "nothing came of it"
            self.clock.sleep(1.0)


class Reply:
    """The one answer to a message."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock, self.content, self.at = clock, None, FOREVER

    def take(self, content: RecordDict) -> None:
        assert self.content is None, "answered twice"
        self.content, self.at = content, self.clock.now()

    @property
    def status(self) -> Status:
        return protocol.from_json(Status, str(self.content[protocol.STATUS]["json"]))

    @property
    def trained(self) -> tuple[int, float]:
        """Steps by the result, and by the weights."""
        arrays = self.content[protocol.ARRAYS]
        return self.status.result.steps, float(arrays["n"].numpy()[0])


def order(steps: int, seq: int = 0, version: int = 0) -> Order:
    return Order("k", "x", seq, "train", version, steps)


def max_queued(segments: list) -> int:
    """Return how many jobs waited at the same time, at most."""
    queued = [s for s in segments if s.what == "queue"]
    changes = sorted([(s.begin, 1) for s in queued] + [(s.end, -1) for s in queued])
    return max(accumulate(step for _, step in changes))


def states(site: Site) -> list[tuple[str, float, float]]:
    return [(s.what, s.begin, s.end) for s in site.pool.segments]
