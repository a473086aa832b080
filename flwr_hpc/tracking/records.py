"""What is known of a run and of each facility at one moment."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from flwr_hpc.tracking.accounts import Accounts
from flwr_hpc.tracking.timeline import PHASES, Interval, Timeline, totals

# What the timeline shows while a facility is in a state.
PHASE_OF = {
    "queued": "queue",
    "starting": "startup",
    "loading": "load",
    "training": "train",
    "evaluating": "evaluate",
    "transferring": "transfer",
}
MOST_HOLDS = 1000
WORKING = {"train": "training", "evaluate": "evaluating"}
WAITING = ("queued", "starting", "loading")


@dataclass
class OpenOrder:
    """An order sent and not yet answered."""

    kind: str
    version: int
    steps: int
    sent_s: float


@dataclass
class FacilityState:
    """One facility."""

    name: str
    # ``offline``, ``idle``, ``queued``, ``starting``, ``loading``, ``ready``, ``training``,
    # ``evaluating``, ``transferring``, ``excluded`` or ``done``; since `since_s`.
    state: str = "offline"
    since_s: float = 0.0
    allocation: str = ""
    walltime_left_s: float | None = None
    # Forecast of the wait of a queued allocation as told at `told_s`, and why it waits.
    queue_wait_s: float | None = None
    queue_wait_high_s: float | None = None
    reason: str = ""
    # What is on its way to the site or from it, by way and payload (weights in shards have one
    # each): bytes, of how many, MB per second.
    transfers: dict[tuple[str, str], tuple[int, int, float]] = field(default_factory=dict)
    trouble: str = ""  # What keeps the site from working
    told_s: float = 0.0
    order_id: str = ""
    step: int = 0  # Progress of the current order
    order_steps: int = 0
    loss: float | None = None  # The newest known
    tokens_per_s: float | None = None
    peak_memory_gb: float | None = None  # The most any rank had so far
    mfu: float | None = None  # Percent, the newest known
    # By version of the global model: when the version came to be, and its held-out loss here
    # in nats per token.
    held_out: dict[int, tuple[float, float]] = field(default_factory=dict)
    # Seconds of the run, optimizer steps so far, loss.
    train_loss: list[tuple[float, int, float]] = field(default_factory=list)
    # Of orders that a codec has encoded: their number, bytes as a share of the weights', and the
    # norm of what it left out as a share of the update's, where that is kept.
    encoded: list[tuple[int, float, float | None]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0  # Of finished training orders, each counted once
    tokens: int = 0
    orders: int = 0
    rejected: int = 0  # Replies refused; orders that failed for another reason
    failed: int = 0
    merged: int = 0  # Replies aggregated, and the sum of their staleness
    staleness: int = 0
    # What scheduler and facility tell of each allocation.
    accounts: Accounts = field(default_factory=Accounts)
    # From when on which allocation worked for this facility.
    holds: list[tuple[float, str]] = field(default_factory=list)
    hold_from_s: float | None = 0.0  # since when no allocation works here
    # At most so much is the facility's clock behind the server's (below 0: ahead); only to
    # place what the scheduler tells on the timeline.
    skew_s: float | None = None
    excluded: str = ""  # Why it is left out of the run
    # When, ``rejected``, ``failed`` or ``excluded``, and why.
    marks: list[tuple[float, str, str]] = field(default_factory=list)
    open: dict[str, OpenOrder] = field(default_factory=dict)
    refused: str = ""  # order whose reply was just rejected
    done: dict[str, None] = field(default_factory=dict)  # the newest orders
    timeline: Timeline = field(default_factory=Timeline)
    settled_s: float = 0.0  # the timeline before this is final
    acquiring_s: float | None = None  # when the wait for an allocation began
    acquired: tuple[float, float, float] | None = None  # a wait the ledger has yet to divide

    @property
    def held_out_curve(self) -> list[tuple[float, int, float]]:
        """Seconds of the run, version, held-out loss; by version."""
        return [(s, v, loss) for v, (s, loss) in sorted(self.held_out.items())]

    def accounted(self) -> dict[str, float]:
        """Return seconds by phase over all allocations of the ledger, zeros if it is empty."""
        seconds = self.accounts.seconds()
        return {phase: seconds.get(phase, 0.0) for phase in PHASES}

    def seconds(self) -> dict[str, float] | None:
        """Return seconds by phase: the ledger's, else the timeline's, else None."""
        if self.accounts.allocations:
            return self.accounted()
        return totals(self.timeline.intervals) if self.timeline.intervals else None

    def intervals(self, until_s: float) -> list[Interval]:
        """Return the timeline up to `until_s`, the current state included."""
        end = self.timeline.end_s
        now = [(end, until_s, PHASE_OF.get(self.state, "idle"))] if until_s > end else []
        return self.timeline.intervals + now

    def become(self, state: str, s: float) -> None:
        """Change the state; the time since the last change goes to the timeline."""
        if state == self.state:
            return
        self.timeline.extend(s, PHASE_OF.get(self.state, "idle"))
        if state in WAITING and self.acquiring_s is None:
            self.acquiring_s = s
        elif state not in WAITING and self.acquiring_s is not None:
            self.acquire(self.acquiring_s, s)
            self.acquiring_s = None
        self.state, self.since_s = state, s

    def acquire(self, seen_s: float, ready_s: float) -> None:
        """Note an allocation: when its wait was seen at the latest, and when it was over."""
        sent_s = min((order.sent_s for order in self.open.values()), default=0.0)
        self.acquired = (max(self.settled_s, sent_s), seen_s, ready_s)
        self.settled_s = ready_s

    def hold(self, name: str, s: float) -> None:
        """An allocation works for this facility from now on, or since the last one ended."""
        before = self.holds[-1][1] if self.holds else ""
        if name != before:
            if job := self.accounts.of(name):
                job.before = before
            since = s if self.hold_from_s is None else self.hold_from_s
            self.holds.append((since, name))
            del self.holds[:-MOST_HOLDS]
        self.hold_from_s = None

    def rest(self, s: float) -> None:
        """Enter the state of an order in flight, or that between two orders.

        Sites answer late (long polls), so an order that is with an allocation counts as being
        worked on until more is known.
        """
        order = next(iter(self.open.values()), None)
        if order:
            working = WORKING.get(order.kind) if self.allocation else None
            self.become(working or "transferring", s)
        else:
            self.become("ready" if self.allocation else "idle", s)


@dataclass
class RunState:
    """The whole run."""

    run_key: str = ""
    strategy: str = ""
    rounds: int = 0
    rounds_done: int = 0
    version: int = 0  # Newest version of the global model
    # ``unknown`` (no event yet), ``running``, ``finished``, ``failed`` or ``interrupted``.
    status: str = "unknown"
    error: str = ""
    wall_s: float = 0.0  # Seconds of the run so far
    started_t: float | None = None
    version_s: dict[int, float] = field(default_factory=dict)  # When each version came to be
    # How inexact the average of LoRA adapters was, by version; why where that is not known.
    lora_inexactness: dict[int, float] = field(default_factory=dict)
    lora_inexactness_unknown: str = ""
    lora_inexactness_removed: dict[int, float] = field(default_factory=dict)  # by the strategy
    # When each session began; more than one after a resume.
    sessions: list[float] = field(default_factory=list)
    # Unix seconds and seconds of the run at these moments.
    clocks: list[tuple[float, float]] = field(default_factory=list)
    facilities: dict[str, FacilityState] = field(default_factory=dict)

    def facility(self, name: str) -> FacilityState:
        """Return a facility's state, new if it was not heard of before."""
        return self.facilities.setdefault(name, FacilityState(name))

    def held_out_curve(self) -> list[tuple[float, int, float]]:
        """Return seconds, version and the global held-out loss: the mean over facilities.

        Over the versions that every facility with a held-out loss has reached; a facility that
        skipped one counts with the line between its neighbours, or its newest.
        """
        curves = [f.held_out_curve for f in self.facilities.values() if f.held_out]
        if not curves:
            return []
        moments = {v: s for curve in curves for s, v, _ in curve}
        since = max(curve[0][1] for curve in curves)
        return [
            (moments[v], v, sum(_between(curve, v) for curve in curves) / len(curves))
            for v in sorted(moments)
            if v >= since
        ]


def _between(curve: list[tuple[float, int, float]], version: int) -> float:
    """Return the loss at a version from the first on, interpolated where it is not known."""
    after = bisect.bisect_left(curve, version, key=lambda point: point[1])
    if after == len(curve):
        return curve[-1][2]
    _, v1, high = curve[after]
    if v1 == version:
        return high
    _, v0, low = curve[after - 1]
    return low + (high - low) * (version - v0) / (v1 - v0)
