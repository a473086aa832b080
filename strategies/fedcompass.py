"""FedCompass: sites of different speed are given work that ends together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from strategies.base.asynchronous import AsyncStrategy
from strategies.engine.state import Failure, Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.blocks import Tensors
from strategies.parts.buffer import Buffer, Update, deltas
from strategies.parts.pace import SpeedEstimate


@dataclass
class _Group:
    """Sites that are expected to arrive together."""

    persistent_times: ClassVar = ("expected", "latest")

    expected: float  # T_exp and T_late, on the run's clock
    latest: float
    members: list[str] = field(default_factory=list)  # Have yet to arrive
    buffer: Buffer = field(default_factory=Buffer)  # Of those who have arrived

    def everybody(self) -> list[str]:
        return [*self.members, *(update.facility for update in self.buffer)]


class FedCompass(AsyncStrategy):
    """FedCompass (arXiv 2309.14675): semi-asynchronous, by computing-power-aware scheduling.

    A site's first update makes a version at once. From then on its speed s is known, and it is
    assigned to a group of sites that are to arrive together at T_exp: to the one in which it can
    do the most steps ``Q = floor((T_exp - now) / s)`` within [min_steps, max_steps]. If there is
    none it founds one, with as many steps as let it arrive by the time another group, fired at
    its latest, could be back: ``Q = floor((T_late + f max_steps - now) / s)``, f being the
    seconds per step of that group's fastest site.

    A group makes a version when all of its sites have arrived, or at ``T_late = now + slack Q s``
    with those who have; they are assigned anew, the fastest first. An update that misses its
    group goes into the version of the next one. A version is
    ``theta - sum_k alpha s(tau_k) / N delta_k``.

    Parameters
    ----------
    min_steps, max_steps : int
        Q_min and Q_max. A site's first order has Q_max steps.
    slack : float
        lambda: how much longer than expected a group is waited for.
    momentum : float
        Weight of the newest observation in the moving average of seconds per step.
    alpha : float
        Weight of a fresh update, before it is divided by the number of sites N.
    staleness : str
        s(tau), see `strategies.parts.rules.staleness_rule`.
    a, b : float or None
        Its parameters; None: their defaults.
    normalise : bool
        False: every update weighs alpha / N. True: the weights of a version sum to alpha.
    average : float or None
        See `strategies.base.asynchronous.AsyncStrategy`. Orders are sized here already.
    """

    persistent = ("_groups", "_idle", "_orders")

    def __init__(
        self,
        *,
        min_steps: int = 20,
        max_steps: int = 100,
        slack: float = 1.5,
        momentum: float = 0.9,
        alpha: float = 0.9,
        staleness: str = "polynomial",
        a: float | None = None,
        b: float | None = None,
        normalise: bool = False,
        average: float | None = None,
    ) -> None:
        super().__init__(average=average)
        limits.steps(min_steps, max_steps)
        limits.positive("slack", slack)
        limits.positive_share("momentum", momentum)
        limits.positive_share("alpha", alpha)
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.slack = slack
        self.alpha = alpha
        self._decay = rules.staleness_rule(staleness, a=a, b=b)
        self.normalise = normalise
        self.pace = SpeedEstimate(1.0 - momentum)
        self._groups: list[_Group] = []  # In the order of their founding
        self._late = Buffer()  # What missed its group, for the next version of any
        self._idle: list[str] = []  # Whose group has fired, in the order of their arrival
        self._orders: dict[str, int] = {}  # Steps that were assigned and are not handed out yet

    def staleness_weight(self, staleness: int) -> float:
        """Return s(tau)."""
        return self._decay(staleness)

    def models_kept(self, sites: int) -> int:
        """Return those of its parts; of each site an update is late or waits in its group."""
        return super().models_kept(sites) + sites

    # ---- grouping ---------------------------------------------------------------------------

    def plan(self, site: SiteState) -> Plan | None:
        """Let a site that has arrived wait for its group, and put a free one into a group."""
        name = site.facility
        if any(name in {u.facility for u in g.buffer} for g in self._groups):
            return None
        if not self.pace.step_s.get(name):
            return Plan(self.max_steps)
        group = self._group_of(name)
        if group is None:
            self._assign_idle(name)
        elif name not in self._orders:  # its order was given up
            fits = self._fits(group.expected - self.now(), name)
            return Plan(min(max(fits, self.min_steps), self.max_steps))
        return Plan(self._orders.pop(name))

    def _assign_idle(self, name: str) -> None:
        """Assign a free site; with those who arrived together with it, the fastest first."""
        here = [each for each in self._idle if each == name or self.sites[each].online]
        together = here if name in here else [name]
        for each in sorted(together, key=lambda each: self.pace.step_s[each]):
            self._orders[each] = self._join(each) or self._start_group(each)
        self._idle = [each for each in self._idle if each not in together]

    def _group_of(self, name: str) -> _Group | None:
        return next((g for g in self._groups if name in g.members), None)

    def _fits(self, seconds: float, name: str) -> int:
        return int(seconds / self.pace.step_s[name] + 1e-9)

    def _join(self, name: str) -> int:
        """Join the group that has room for most steps, the youngest of equals; 0: none has."""
        now = self.now()
        fits = [(self._fits(g.expected - now, name), k) for k, g in enumerate(self._groups)]
        able = [fit for fit in fits if self.min_steps <= fit[0] <= self.max_steps]
        if not able:
            return 0
        steps, k = max(able)
        self._groups[k].members.append(name)
        return steps

    def _start_group(self, name: str) -> int:
        """Found a group that arrives when another one could be back; return the site's steps."""
        now, speeds = self.now(), self.pace.step_s
        fits = []
        for group in self._groups:
            fastest = min((speeds[m] for m in group.everybody()), default=None)
            if fastest is not None and now < group.latest:
                back = group.latest + fastest * self.max_steps
                fits.append(self._fits(back - now, name))
        steps = max((fit for fit in fits if fit <= self.max_steps), default=self.max_steps)
        steps = max(steps, self.min_steps)
        work_s = steps * speeds[name]
        self._groups.append(_Group(now + work_s, now + self.slack * work_s, [name]))
        return steps

    # ---- arrivals ---------------------------------------------------------------------------

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Gather an update; a site's first, and the last of a group, make a version."""
        name = result.facility
        first, group = not self.pace.step_s.get(name), self._group_of(name)
        self.pace.observe(result)  # ahead of the grouping, which goes by the newest speeds
        if group is not None:
            group.members.remove(name)
        if self.counts(result, staleness):
            buffer = Buffer() if first else self._late if group is None else group.buffer
            buffer.add(self.keep_tensors, result)
            if first:
                return self._merge(buffer.take())
        return self._fire(group) if group is not None and not group.members else None

    def pending(self) -> list[str]:
        """Return what waits for its group, or for any."""
        return [u.order_id for b in self._buffers() for u in b]

    def _buffers(self) -> list[Buffer]:
        return [self._late, *(g.buffer for g in self._groups)]

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
        """Merge a group that is due.

        Without an arrival it makes a version of what is late: where queues outlast every group
        there would be none at all. Without that it is forgotten.
        """
        return self._fire(min(self._groups, key=lambda g: (bool(g.members), g.latest)))

    def _fire(self, group: _Group) -> Tensors | None:
        self._groups.remove(group)
        for name in group.members:  # assigned, and not asked for an order since
            self._orders.pop(name, None)
        arrived = group.buffer.take()
        self._idle += [u.facility for u in arrived]
        updates = [*self._late.take(), *arrived]
        return self._merge(updates) if updates else None

    def _merge(self, updates: Sequence[Update]) -> Tensors:
        share = self.alpha / (len(updates) if self.normalise else self.num_sites)
        weights = [share * self.staleness_weight(self.version - u.version) for u in updates]
        found = deltas(updates)
        self.averaged(found, weights)
        return rules.weighted_step(self.arrays, found, weights)
