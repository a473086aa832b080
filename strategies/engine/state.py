"""What the engine knows: sites, work, messages in flight, and what it reports to a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flwr.app import ArrayRecord, Message, RecordDict

from flwr_hpc.protocol import GRADIENT, WEIGHT_KEY, Order, OrderKind, Status
from strategies.parts.blocks import Lazy

ExtraArrays = Mapping[str, Callable[[], Iterable[tuple[str, Lazy]] | None]]


@dataclass(frozen=True)
class Binding:
    """What an order starts from, decided as it is submitted."""

    version: int
    arrays: ArrayRecord | None  # All weights of that version, whatever of them travels
    options: Mapping[str, Any] = field(default_factory=dict)  # Added to the order's
    merges: list[str] | None = None  # See `flwr_hpc.protocol.Order`
    returns: list[str] | None = None
    evaluate: bool = True  # The version may be evaluated with it, where it is due


@dataclass
class SiteState:
    """A facility as the server sees it."""

    facility: str
    launcher: bool  # It speaks `flwr_hpc.protocol`; else it is an ordinary ClientApp
    node_id: int  # The newest node that spoke for this facility
    offline_since: float | None = None  # On the server's clock; None while online
    allocation: str = ""
    allocation_state: str = ""
    walltime_left_s: float | None = None
    # When the allocation's walltime is over, on the server's clock, by its last word.
    ends_at: float | None = None
    evaluated: int = -1  # Last version of the global model evaluated here (-1: none)
    release: bool = False  # Its queued job is to be cancelled
    # By its last word an allocation runs with everything loaded: the next order needs no
    # question first.
    warm: bool = False
    heard_at: float = 0.0  # When it last answered, on the server's clock
    # Why it is left out of the run: what it said trying again will not fix, or that it is revoked.
    # Until it is back as another node: somebody has fixed it.
    refusal: str = ""

    @property
    def online(self) -> bool:
        """Whether Flower lists its node."""
        return self.offline_since is None

    def reachable(self, now: float, grace_s: float) -> bool:
        """Return whether it is online, or was so shortly before."""
        return self.offline_since is None or now - self.offline_since <= grace_s


@dataclass(frozen=True)
class Plan:
    """What a site is to do next."""

    steps: int = 0  # To train; 0: as many as the site is configured for
    options: Mapping[str, Any] = field(default_factory=dict)  # Added to the order's
    # So long after this order was submitted the next one may be, to wait at the site until
    # this one is done (None: only when this one's result is here).
    prefetch_after_s: float | None = None
    # Makes further arrays for the order, by their key in the message (see
    # `flwr_hpc.protocol`): called, like the weights are chosen, when the order is submitted;
    # None: without. Ordinary ClientApps are sent none.
    extra_arrays: ExtraArrays = field(default_factory=dict)
    # ``bind(running)``, called when the order is submitted, with the one that is under way
    # there (None: none): what it starts from and which tensors travel. None: the newest
    # version, whole.
    bind: Callable[[Order | None], Binding] | None = None
    kind: OrderKind = "train"
    # Sent as it is, in place of weights and options: what a hook of Flower's made.
    content: RecordDict | None = None
    # Its result is wanted also when it comes after the order was given up, since the site was away.
    late: bool = False
    checked: bool = True  # Hold an ordinary ClientApp's weights to `Runtime.check`, too


@dataclass(eq=False)
class Request:
    """One plan on its way: acquire, submit, collect, arrived.

    The order is made, and its number taken, at the first submission: a request that still
    waits for an allocation is bound to nothing.
    """

    facility: str
    plan: Plan
    created: float
    phase: Literal["acquire", "submit", "collect", "arrived"] = "acquire"
    order: Order | None = None
    base: ArrayRecord | None = None  # All weights of the version the order starts from
    part: ArrayRecord | None = None  # Of the base, what travels
    extra_arrays: dict[str, ArrayRecord] = field(default_factory=dict)
    attempts: int = 0
    refusals: int = 0
    asked: bool = False
    submitted_at: float | None = None
    not_before: float = 0.0
    step: int = -1
    resumed: bool = False  # An order of an interrupted run

    @property
    def kind(self) -> OrderKind:
        """Of the order."""
        return self.plan.kind

    @property
    def prefetch_at(self) -> float | None:
        """When the next order may be submitted, on the server's clock."""
        if self.submitted_at is None or self.plan.prefetch_after_s is None:
            return None
        return self.submitted_at + self.plan.prefetch_after_s

    @property
    def order_id(self) -> str:
        """The order's id, empty before the first submission."""
        return self.order.id if self.order else ""


@dataclass(frozen=True)
class InFlight:
    """A message whose reply is awaited."""

    node_id: int
    kind: str
    sent_at: float
    message: Message
    request: Request | None


@dataclass(frozen=True)
class SiteResult:
    """A finished order."""

    order: Order
    base: ArrayRecord | None  # The weights the order started from
    arrays: ArrayRecord | None  # The trained weights (None of an evaluation)
    metrics: dict[str, float]
    message: Message  # The reply itself
    status: Status | None = None  # None from an ordinary ClientApp
    took_s: float = 0.0  # From its submission to its arrival, on the server's clock
    resumed: bool = False  # It was submitted again after an interruption: `took_s` is from then

    @property
    def facility(self) -> str:
        """Where it was worked on."""
        return self.order.facility

    @property
    def gradient(self) -> ArrayRecord | None:
        """The mean gradient of the order's steps, if the site was asked for it and knows it."""
        record = self.message.content.get(GRADIENT)
        return record if isinstance(record, ArrayRecord) else None

    @property
    def steps(self) -> int:
        """How many steps were really trained."""
        result = self.status.result if self.status else None
        return result.steps if result else int(self.metrics.get("steps", self.order.steps))

    @property
    def examples(self) -> int:
        """How many examples were really trained on: the weight of the update."""
        result = self.status.result if self.status else None
        return int(result.examples if result else self.metrics.get(WEIGHT_KEY, 1))

    @property
    def empty(self) -> bool:
        """Whether the site says that it has trained nothing."""
        result = self.status.result if self.status else None
        told = result.steps if result else self.metrics.get("steps")
        return told is not None and told < 1

    @property
    def queued_s(self) -> float:
        """How long this site has waited so far with no allocation running, by its scheduler."""
        return self.status.queued_s if self.status else 0.0

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
    fatal: bool = False  # The site is left out from now on


Event = SiteResult | Failure


@dataclass
class Memory:
    """What of the engine survives a restart, as JSON; orders in flight by their ids."""

    seq: dict[str, int] = field(default_factory=dict)
    evaluated: dict[str, int] = field(default_factory=dict)
    orders: dict[str, Order] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)  # of a facility's last updates
