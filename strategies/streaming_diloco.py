"""Streaming DiLoCo: the model is synchronized in fragments, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from flwr_hpc.protocol import Order
from strategies.base.asynchronous import AsyncStrategy
from strategies.base.fields import StoredTensors
from strategies.base.window import check_window
from strategies.engine.messages import part_of
from strategies.engine.state import Binding, Failure, Plan, SiteResult, SiteState
from strategies.parts import limits, rules
from strategies.parts.blocks import Lazy, Tensors
from strategies.parts.buffer import Buffer, Update, deltas
from strategies.parts.fragments import Fragments
from strategies.parts.pace import SpeedEstimate

# Of an order's options: the synchronization it takes part in; it waited for the one before it.
WINDOW, AHEAD = "window", "ahead"


class StreamingDiLoCo(AsyncStrategy):
    """Streaming DiLoCo (arXiv 2501.18512): one of P fragments is synchronized after each order.

    Sites keep their weights from order to order. In window w (the w-th order of every site) all
    report fragment p = w mod P, the tensors theta_p. When all that take part have reported, with
    ``delta_p = sum_k w_k (theta_p - theta_p,k)`` against the global value of the last
    synchronization of p::

        m_p     <- beta m_p + delta_p
        theta_p <- theta_p - eta (delta_p + beta m_p)

    which makes a version that differs from the one before in fragment p alone. It travels back
    with the next order (`overlap`: the one after, while the site trains on), where the site goes
    on from ``(1 - alpha) theta_p + alpha theta_p,k``. An order has H / P inner steps, H being
    those of the configuration, and moves 1/P of the model each way; P versions synchronize the
    whole of it. With P = 1, alpha = 0 and no overlap it is DiLoCo.

    A site without weights of its own (new, or its state is lost) is sent all of them. Ordinary
    ClientApps, which keep nothing, are sent and return whole models; of what they return the
    fragment is used.

    Parameters
    ----------
    fragments : int
        P; at most as many as the model has tensors.
    alpha : float
        Share of its own value that a site keeps of a fragment that comes back; 0 replaces it.
    overlap : bool
        A site goes on with the next order while a fragment travels and is merged. It is never
        more than one order ahead, and needs two fragments at least.
    outer_lr, momentum : float
        eta and beta.
    nesterov : bool
        Else momentum is plain: ``theta_p <- theta_p - eta m_p``.
    weighted_by : str
        ``uniform`` (the paper's) or ``num-examples``.
    deadline_s : float or None
        A window closes so long after it was opened (None: when all have reported). What comes
        later is dropped; in alpha of it the site's next report holds it still.
    quorum : int
        A window with fewer reports at its deadline stays open for another one.
    average : float or None
        See `strategies.base.asynchronous.AsyncStrategy`.
    """

    persistent = ("working", "_held", "_former", "_opened")
    persistent_times = ("_closes_at",)

    def __init__(
        self,
        *,
        fragments: int = 4,
        alpha: float = 0.5,
        overlap: bool = True,
        outer_lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        weighted_by: Literal["num-examples", "uniform"] = "uniform",
        deadline_s: float | None = None,
        quorum: int = 1,
        average: float | None = None,
    ) -> None:
        super().__init__(average=average)
        limits.one_of("weighted_by", weighted_by, limits.WEIGHTINGS)
        self.weighted_by = weighted_by
        if fragments < 1:
            raise ValueError(f"fragments={fragments} must be at least 1")
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"alpha={alpha} must be at least 0 and less than 1")
        check_window(deadline_s=deadline_s, quorum=quorum)
        self.fragments = fragments
        self.alpha = alpha
        self.overlap = overlap
        self.deadline_s = deadline_s
        self.quorum = quorum
        self.pace = SpeedEstimate(0.7)
        self.outer = Fragments(fragments, outer_lr, momentum, nesterov)
        self.working: dict[str, list[int]] = {}  # facility -> windows it works on, ascending
        self._held: dict[str, tuple[int, int]] = {}  # -> order whose weights it has, its version
        self._buffers = [Buffer(), Buffer()]  # of the present window and of the next one
        self._former: StoredTensors | None = None  # the version before the newest
        self._opened = False  # somebody has been asked since the last window closed
        self._closes_at: float | None = None

    def models_kept(self, sites: int) -> int:
        """Return those of its parts, the version before the newest, and two windows' updates."""
        return super().models_kept(sites) + 1 + -(-2 * sites // self.fragments)

    # ---- fragments --------------------------------------------------------------------------

    @property
    def parts(self) -> list[list[str]]:
        """The names of every fragment's tensors."""
        return self.outer.parts(self.arrays)

    def names(self, window: int) -> list[str]:
        """Return the tensors that a window synchronizes."""
        return self.parts[window % len(self.parts)]

    @property
    def steps(self) -> int:
        """Inner steps of an order; 0: as the site is configured."""
        return self.default_steps and max(1, round(self.default_steps / len(self.parts)))

    @property
    def lag(self) -> int:
        """How many windows a site may be ahead of the newest version."""
        return int(self.overlap and len(self.parts) > 1)

    # ---- who does what ----------------------------------------------------------------------

    def plan(self, site: SiteState) -> Plan | None:
        """Let a free site take part in the present window, or the next if it has reported."""
        self.working.pop(site.facility, None)
        return self._ask(site.facility, site.launcher, self.version)

    def plan_next(self, site: SiteState) -> Plan | None:
        """Have the next order wait at the site, once there is what it starts from."""
        return self._ask(site.facility, site.launcher, self.working[site.facility][-1] + 1)

    def _ask(self, facility: str, launcher: bool, window: int) -> Plan | None:
        self._opened = True
        if self._closes_at is None and self.deadline_s is not None:
            self._closes_at = self.now() + self.deadline_s
        window = self._lacking(facility, window)
        if window > self.version + self.lag:
            return None
        # What follows the running order is gone: an order ahead that failed is not waited for.
        self.working[facility] = [*self.working.get(facility, [])[:1], window]
        if window >= self.versions:
            return None
        bind = self._bind if launcher else self._bind_whole
        return Plan(
            steps=self.steps,
            prefetch_after_s=self._prefetch_after_s(facility),
            bind=lambda running: bind(facility, running),
        )

    def _lacking(self, facility: str, window: int) -> int:
        """Return the first window, from this one on, that is open and lacks a site's report.

        It need not be the one after the last report: of two orders the first may have been lost.
        """
        reported = {
            self.version + k
            for k, buffer in enumerate(self._buffers)
            if any(update.facility == facility for update in buffer)
        }
        window = max(window, self.version)
        while window in reported:
            window += 1
        return window

    def _prefetch_after_s(self, facility: str) -> float | None:
        """Hand the next order in halfway: what it starts from is there by then, as a rule."""
        step_s = self.pace.step_s.get(facility)
        if not self.lag or not step_s:
            return None
        train_s = self.steps * step_s
        return max(0.0, min(0.5 * train_s, train_s - 1.2 * self.pace.overhead_s.get(facility, 0.0)))

    def _bind(self, facility: str, running: Order | None) -> Binding:
        """Bind an order to the window of its turn, and to the fragments the site lacks.

        It starts from the version `lag` behind its window even where a newer one is there: what
        a site trains from does not depend on who is faster.
        """
        window = self._turn(facility)
        options: dict[str, Any] = {WINDOW: window, AHEAD: running is not None}
        held = self._held.get(facility)
        if running is not None:
            held = running.seq, running.version
        if held is None:
            return Binding(self.version, self.arrays, options, returns=self.names(window))
        after, had = held
        version = max(had, window - self.lag)
        former = self._former.arrays if self._former else None
        arrays = self.arrays if version == self.version else former
        new = range(max(had, version - len(self.parts)), version)
        merges = sorted({name for passed in new for name in self.names(passed)})
        options |= {"after": after, "alpha": self.alpha}
        once = version % len(self.parts) == 0  # in a cycle, that is as often as DiLoCo's
        return Binding(version, arrays, options, merges, self.names(window), once)

    def _bind_whole(self, facility: str, running: Order | None) -> Binding:
        return Binding(self.version, self.arrays, {WINDOW: self._turn(facility)})

    def _turn(self, facility: str) -> int:
        """Return the window of an order that is submitted now: while it queued, some may close."""
        windows = self.working[facility]
        windows[-1] = self._lacking(facility, windows[-1])
        return windows[-1]

    # ---- windows ----------------------------------------------------------------------------

    def awaited(self) -> set[str]:
        """Return who works on an order of the present window."""
        return {
            f for f, windows in self.working.items() if self.version in windows and self.busy(f)
        }

    def complete(self) -> bool:
        """Return whether the present window has reports and nobody is left to wait for."""
        return len(self._buffers[0]) > 0 and self._opened and not self.awaited()

    def counts(self, result: SiteResult, staleness: int) -> bool:
        """Return whether a report is in time."""
        return int(result.order.options[WINDOW]) >= self.version

    def pending(self) -> Iterator[str]:
        """Return the ids of the orders that wait in the windows."""
        return (u.order_id for buffer in self._buffers for u in buffer)

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Gather a report; the last one closes the window."""
        facility, order = result.facility, result.order
        window = int(order.options[WINDOW])
        windows = self.working.get(facility, [])
        if window in windows:
            windows.remove(window)
        self._held[facility] = order.seq, order.version
        self.pace.observe(result, ahead=bool(order.options.get(AHEAD)))
        if self.counts(result, staleness):
            assert result.base is not None
            base = part_of(result.base, self.names(window))
            buffer = self._buffers[window - self.version]
            buffer.add(self.keep_tensors, dataclasses.replace(result, base=base))
        return self._close() if self.complete() else None

    def on_failure(self, failure: Failure) -> None:
        """Wait for a failed site no longer; its next order brings everything."""
        del self.working.get(failure.facility, [])[:1]
        self._held.pop(failure.facility, None)

    def wake_at(self) -> float | None:
        """Return when the window closes: now, if the last one it waited for has failed."""
        return self.now() if self.complete() else self._closes_at

    def on_wake(self) -> Tensors | None:
        """Close the window; one without a quorum is opened for another deadline."""
        if len(self._buffers[0]) >= self.quorum or self.complete():
            return self._close()
        self._closes_at = None if self.deadline_s is None else self.now() + self.deadline_s
        return None

    def _close(self) -> Tensors:
        """Step along the window's fragment."""
        window = self.version
        updates = sorted(self._buffers[0].take(), key=lambda update: update.facility)
        self._buffers.reverse()
        self._opened, self._closes_at = False, None
        self._former = self.newest() if self.lag else None
        moved = deltas(updates)
        weights = [self._weight(update) for update in updates]

        def delta_of(name: str) -> Lazy:
            return rules.mean_of(name, moved, weights)

        index = window % len(self.parts)
        return self.outer.step(self.keep_tensors, self.arrays, index, delta_of)

    def version_weight(self, updates: int) -> float:
        """Return the part of a round: one fragment of P."""
        return super().version_weight(updates) / len(self.parts)

    def _weight(self, update: Update) -> float:
        return 1.0 if self.weighted_by == "uniform" else float(update.examples) or 1e-12
