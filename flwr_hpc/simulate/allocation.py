"""What a simulated job is, and the order it works on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from flwr_hpc.protocol import LOCAL_UPDATE_SHARE, Order
from flwr_hpc.simulate.learning.base import Weights
from flwr_hpc.simulate.queues.models import Ticket


@dataclass
class Task:
    """An order and how far it got."""

    order: Order
    weights: Weights
    start: Weights = field(default_factory=dict)
    correction: Weights = field(default_factory=dict)
    gradients: Weights = field(default_factory=dict)  # summed up, if they are asked for
    share: float = 0.0
    own_seq: int = -1
    done: int = 0
    loss_sum: float = 0.0
    tries: int = 0
    finished: bool = False
    failed: str = ""
    refused: bool = False


@dataclass
class Allocation:
    """A job: in the queue, loading, ready or ended."""

    name: str
    submitted: float
    expected_s: float = 0.0  # wait that was forecast
    kept_s: float = 0.0  # of its walltime, to write
    state: Literal["queued", "loading", "ready", "ended"] = "queued"
    has_begun: bool = False  # Has ever run; a preempted job waits again
    started: float = 0.0
    ends: float = 0.0
    since: float = 0.0  # in this state, or idle
    released: bool = False
    stay: int = 0  # grows whenever what was planned for it is void
    ticket: Ticket | None = None
    own: Weights = field(default_factory=dict)  # how the last order here moved the weights
    own_seq: int = -1
    task: Task | None = None
    task_began: float = 0.0
    inbox: list[Task] = field(default_factory=list)

    def fitness(self) -> tuple[int, float, str]:
        """Return what to choose by: new orders go to the allocation with the greatest.

        A ready one before one that loads before one that waits; of the first two the one that
        lasts longest, of those that wait the one that does so longest.
        """
        rank = ("ended", "queued", "loading", "ready").index(self.state)
        return rank, -self.submitted if self.state == "queued" else self.ends, self.name


def merge(task: Task, held: str, local: Weights) -> bool:
    """Merge what came with an order into the site's weights; False if these are not here."""
    order, given = task.order, task.weights
    if order.merges is None:
        return True
    if held != dataclasses.replace(order, seq=int(order.options["after"])).id:
        return False
    alpha = np.float32(order.options.get("alpha", 0.0))
    merged = {k: (1 - alpha) * given[k] + alpha * local[k] for k in order.merges}
    task.weights = {**local, **merged}
    return True


def prepare(task: Task, own: Weights, seq: int) -> None:
    """Begin an order: from its weights, moved by a share of the site's last update if asked to."""
    if task.start:
        return  # it goes on from where it was
    share = float(task.order.options.get(LOCAL_UPDATE_SHARE, 0.0))
    if share and own and task.weights:
        task.share, task.own_seq = share, seq
        task.weights = {k: w + w.dtype.type(share) * own[k] for k, w in task.weights.items()}
    task.start = dict(task.weights)
