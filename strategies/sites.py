"""What the engine knows: sites, work, messages in flight, and what it reports to a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from flwr.app import ArrayRecord, Message, RecordDict

from flwr_hpc.protocol import Order, OrderKind, Status

__all__ = ["Arrival", "Event", "Failure", "Flight", "Site", "Weights", "Work"]

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


@dataclass
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
    handed_in: float | None = None
    not_before: float = 0.0
    step: int = -1

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
    """

    order: Order
    base: ArrayRecord | None
    arrays: ArrayRecord | None
    metrics: dict[str, float]
    message: Message
    status: Status | None = None

    @property
    def facility(self) -> str:
        """Where it was worked on."""
        return self.order.facility


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
    """What of the engine survives a restart, as JSON."""

    seq: dict[str, int] = field(default_factory=dict)
    evaluated: dict[str, int] = field(default_factory=dict)
    orders: dict[str, Order] = field(default_factory=dict)
