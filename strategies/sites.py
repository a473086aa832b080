"""What the engine knows: sites, work, messages in flight, and what it reports to a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flwr.app import ArrayRecord, Message, RecordDict

from flwr_hpc.protocol import Order, OrderKind, Status

__all__ = ["Arrival", "Event", "Failure", "Flight", "Memory", "Plan", "Site", "Weights", "Work"]

Weights = Callable[[], tuple[int, ArrayRecord | None]]


@dataclass
class Site:
    """A facility as the server sees it.

    Attributes
    ----------
    launcher : bool
        It speaks `flwr_hpc.protocol`; else it is an ordinary ClientApp.
    node_id : int
        The newest node that spoke for this facility.
    offline_since : float or None
        On the server's clock; None while online.
    ends_at : float or None
        When the allocation's walltime is over, on the server's clock, by its last word.
    evaluated : int
        Last version of the global model evaluated here (-1: none).
    release : bool
        Its queued job is to be cancelled.
    warm : bool
        By its last word an allocation runs with everything loaded: the next order needs no
        question first.
    """

    facility: str
    launcher: bool
    node_id: int
    offline_since: float | None = None
    allocation: str = ""
    allocation_state: str = ""
    walltime_left_s: float | None = None
    ends_at: float | None = None
    evaluated: int = -1
    release: bool = False
    warm: bool = False

    @property
    def online(self) -> bool:
        """Whether Flower lists its node."""
        return self.offline_since is None

    def reachable(self, now: float, grace_s: float) -> bool:
        """Return whether it is online, or was so shortly before."""
        return self.offline_since is None or now - self.offline_since <= grace_s


@dataclass(frozen=True)
class Plan:
    """What a site is to do next.

    Attributes
    ----------
    steps : int
        To train; 0: as many as the site is configured for.
    options : dict of str to scalar
        Added to the order's.
    ahead_after_s : float or None
        So long after the hand-in the next order may be handed in, to wait at the site until
        this one is done (None: only when this one has arrived).
    """

    steps: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    ahead_after_s: float | None = None


@dataclass(eq=False)
class Work:
    """One request of a loop on its way: acquire, hand in, collect, arrived.

    The order is made, and its number taken, at the first hand-in: a request that still waits
    for an allocation is bound to nothing.
    """

    facility: str
    kind: OrderKind
    steps: int
    options: dict[str, Any]
    weights: Weights
    content: RecordDict | None
    checked: bool
    created: float
    phase: Literal["acquire", "hand_in", "collect", "arrived"] = "acquire"
    order: Order | None = None
    base: ArrayRecord | None = None
    attempts: int = 0
    refusals: int = 0
    asked: bool = False
    handed_in: float | None = None
    not_before: float = 0.0
    step: int = -1
    ahead_after_s: float | None = None

    @property
    def ahead_at(self) -> float | None:
        """When the next order may be handed in, on the server's clock."""
        if self.handed_in is None or self.ahead_after_s is None:
            return None
        return self.handed_in + self.ahead_after_s

    @property
    def order_id(self) -> str:
        """The order's id, empty before the first hand-in."""
        return self.order.id if self.order else ""

    @property
    def version(self) -> int:
        """The version the order starts from, -1 before the first hand-in."""
        return self.order.version if self.order else -1


@dataclass(frozen=True)
class Flight:
    """A message whose reply is awaited."""

    node_id: int
    kind: str
    sent_at: float
    message: Message
    work: Work | None


@dataclass(frozen=True)
class Arrival:
    """A finished order.

    Attributes
    ----------
    order : Order
    base : ArrayRecord or None
        The weights the order started from.
    arrays : ArrayRecord or None
        The trained weights (None of an evaluation).
    metrics : dict of str to float
    message : Message
        The reply itself.
    status : Status or None
        None from an ordinary ClientApp.
    took_s : float
        From the hand-in to the arrival, on the server's clock.
    """

    order: Order
    base: ArrayRecord | None
    arrays: ArrayRecord | None
    metrics: dict[str, float]
    message: Message
    status: Status | None = None
    took_s: float = 0.0

    @property
    def facility(self) -> str:
        """Where it was worked on."""
        return self.order.facility

    @property
    def steps(self) -> int:
        """How many steps were really trained."""
        result = self.status.result if self.status else None
        return result.steps if result else int(self.metrics.get("steps", self.order.steps))

    @property
    def empty(self) -> bool:
        """Whether the site says that it has trained nothing."""
        result = self.status.result if self.status else None
        return result is not None and result.steps < 1

    @property
    def queued_s(self) -> float:
        """How long this site's jobs have waited so far, all of them, by its scheduler."""
        ledger = self.status.ledger if self.status else {}
        return sum(spent.get("queue", 0.0) for spent in ledger.values())

    @property
    def train_s(self) -> float | None:
        """How long the steps took, by the site's clock."""
        result = self.status.result if self.status else None
        return result.seconds.get("train") if result else None


@dataclass(frozen=True)
class Failure:
    """A request that was given up."""

    facility: str
    kind: OrderKind
    reason: str
    order_id: str = ""


Event = Arrival | Failure


@dataclass
class Memory:
    """What of the engine survives a restart, as JSON; orders in flight by their ids."""

    seq: dict[str, int] = field(default_factory=dict)
    evaluated: dict[str, int] = field(default_factory=dict)
    orders: dict[str, Order] = field(default_factory=dict)
