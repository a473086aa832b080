"""FedCompass: sites of different speed are given work that ends together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from strategies.base.asynchronous import AsyncStrategy
from strategies.engine.state import Failure, Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.buffer import Buffer, Update, deltas
from strategies.parts.pace import SpeedEstimate
from strategies.parts.rules import Tensors


@dataclass
class _Group:
    """Sites that are expected to arrive together.

    ``expected`` and ``latest`` are times on the run's clock; ``members`` have yet to arrive.
    """

    expected: float
    latest: float
    members: list[str] = field(default_factory=list)
    buffer: Buffer = field(default_factory=Buffer)


class FedCompass(AsyncStrategy):
    """FedCompass (arXiv 2309.14675): semi-asynchronous, by computing-power-aware scheduling.

    A site that becomes free joins the arrival group in which it can do the most steps
    ``Q = floor((T - now) / s)`` within [min_steps, max_steps], or founds one. A group is merged
    when all of its sites have arrived, or at its latest time; an update that misses its group
    is merged with the next one.

    Parameters
    ----------
    min_steps, max_steps : int
        Q_min and Q_max.
    slack : float
        lambda: a group is waited for until ``now + lambda Q s``.
    momentum : float
        Of the moving average of seconds per step.
    exponent : float
        Of the staleness weight.
    normalise : bool
        False: every update weighs 1 / N of all N sites. True: the weights of a merge sum to 1.
    """

    def __init__(
        self,
        *,
        min_steps: int = 20,
        max_steps: int = 100,
        slack: float = 1.5,
        momentum: float = 0.9,
        exponent: float = 0.5,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        limits.steps(min_steps, max_steps)
        limits.positive("slack", slack)
        limits.share("momentum", momentum)
        limits.not_negative("exponent", exponent)
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.slack = slack
        self.exponent = exponent
        self.normalise = normalise
        self.pace = SpeedEstimate(momentum)
        self._groups: list[_Group] = []
        self._general = Buffer()  # what came before there were groups, or too late for its own

    def staleness_weight(self, staleness: int) -> float:
        """Return (1 + tau)^-a."""
        return rules.staleness_weight("polynomial", staleness, a=self.exponent)

    # ---- grouping ---------------------------------------------------------------------------

    def plan(self, site: SiteState) -> Plan | None:
        """Let a site that has arrived wait for its group, and put a free one into a group."""
        name = site.facility
        if any(name in {u.facility for u in g.buffer} for g in self._groups):
            return None
        step_s = self.pace.step_s.get(name)
        if not step_s:
            return Plan(self.min_steps)
        group = self._group_of(name)
        if group is None:  # else the order of an interrupted run was given up
            group = self._join(name, step_s) or self._found(name, step_s)
        return Plan(self._steps(group, step_s))

    def _group_of(self, name: str) -> _Group | None:
        return next((g for g in self._groups if name in g.members), None)

    def _steps(self, group: _Group, step_s: float) -> int:
        fits = int((group.expected - self.now()) / step_s + 1e-9)
        return min(max(fits, self.min_steps), self.max_steps)

    def _join(self, name: str, step_s: float) -> _Group | None:
        now = self.now()
        fits = [(int((g.expected - now) / step_s), -i) for i, g in enumerate(self._groups)]
        able = [fit for fit in fits if self.min_steps <= fit[0] <= self.max_steps]
        if not able:
            return None
        group = self._groups[-max(able)[1]]
        group.members.append(name)
        return group

    def _found(self, name: str, step_s: float) -> _Group:
        """Found a group that arrives when another group's fastest site could be back again."""
        now, steps = self.now(), 0
        for group in self._groups:
            speeds = [self.pace.step_s[m] for m in group.members if m in self.pace.step_s]
            if speeds and group.expected > now:
                back = group.expected + min(speeds) * self.max_steps
                fits = int((back - now) / step_s)
                if self.min_steps <= fits <= self.max_steps:
                    steps = max(steps, fits)
        work_s = (steps or self.max_steps) * step_s
        group = _Group(now + work_s, now + self.slack * work_s, [name])
        self._groups.append(group)
        return group

    # ---- arrivals ---------------------------------------------------------------------------

    def on_result(self, arrival: SiteResult, staleness: int) -> Tensors | None:
        """Gather an update; the last one of a group makes a version."""
        self.pace.observe(arrival)
        store, name = self.runtime.checkpoints, arrival.facility
        group = self._group_of(name)
        if group is None:
            self._general.add(store, arrival)
            return self._merge(self._general.take()) if not self._groups else None
        group.members.remove(name)
        group.buffer.add(store, arrival)
        return self._fire(group) if not group.members else None

    def pending(self) -> list[str]:
        """Return what waits for its group, or for any."""
        return [u.order_id for b in self._buffers() for u in b]

    def _buffers(self) -> list[Buffer]:
        return [self._general, *(g.buffer for g in self._groups)]

    def on_failure(self, failure: Failure) -> None:
        """Wait for a failed site no longer."""
        group = self._group_of(failure.facility)
        if group is not None:
            group.members.remove(failure.facility)

    def wake_at(self) -> float | None:
        """Return when the first group is merged without its stragglers."""
        times = [self.now() if not g.members else g.latest for g in self._groups]
        return min(times, default=None)

    def on_wake(self) -> Tensors | None:
        """Merge a group that is due; one without an arrival is forgotten."""
        group = min(self._groups, key=lambda g: (bool(g.members), g.latest))
        return self._fire(group)

    def _fire(self, group: _Group) -> Tensors | None:
        self._groups.remove(group)
        updates = [*group.buffer.take(), *self._general.take()]
        return self._merge(updates) if updates else None

    def _merge(self, updates: list[Update]) -> Tensors:
        weights = [self.staleness_weight(self.version - u.version) for u in updates]
        shares = self._shares(updates)
        found = deltas(self.runtime.checkpoints, updates)
        both = [w * s for w, s in zip(weights, shares, strict=True)]
        return rules.weighted_step(self.arrays, found, both)

    def _shares(self, updates: list[Update]) -> Iterable[float]:
        if self.normalise:
            return [1.0 / len(updates)] * len(updates)
        return [1.0 / max(1, len(self.sites))] * len(updates)

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return groups, buffers and speeds; times as what is left of them."""
        now = self.now()
        return {
            "tensors": [u.name for b in self._buffers() for u in b],
            "general": [asdict(u) for u in self._general],
            "pace": self.pace.state_dict(),
            "groups": [
                {
                    "expected": g.expected - now,
                    "latest": g.latest - now,
                    "members": g.members,
                    "updates": [asdict(u) for u in g.buffer],
                }
                for g in self._groups
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        now = self.now()
        self.pace.load_state_dict(state["pace"])
        self._general.load_state_dict({"updates": state["general"]})
        self._groups = []
        for saved in state["groups"]:
            times = now + saved["expected"], now + saved["latest"]
            group = _Group(*times, list(saved["members"]))
            group.buffer.load_state_dict(saved)
            self._groups.append(group)
