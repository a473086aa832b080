"""FedCompass against sequences of decisions worked out by hand from its published rules.

Times, orders, versions and weights were computed from the rules of arXiv 2309.14675 (Q_min 20,
Q_max 100, lambda 1.5, speed average 0.9, alpha 0.9, s(tau) = (1 + tau)^-0.5) and agree with what
the authors' scheduler decides on the same uploads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from worlds.strategies.driven import Driven

from strategies.fedcompass import FedCompass

Version = tuple[float, dict[str, float]]  # When it was made, and the weight of each site in it
HALF, THIRD = 2**-0.5, 3**-0.5  # s(1), s(2)


class Sequence(Driven):
    """Sites that train what they are given; keeps what is decided.

    Nothing but training takes time. Site k moves the k-th weight by 1, so that a version's step
    shows the weight of each site in it.

    Parameters
    ----------
    seconds : mapping
        By site: the true seconds per step, of each order or of the k-th one.
    """

    def __init__(
        self, seconds: dict[str, float | Callable[[int], float]], **arguments: Any
    ) -> None:
        super().__init__(FedCompass(**arguments), sites=seconds)
        self._put({"w": np.zeros(len(seconds), dtype=np.float32)})
        self.seconds = seconds
        self.due: dict[str, float] = {}
        self.given: list[tuple[float, str, int]] = []  # When, to whom, how many steps
        self.made: list[Version] = []
        self._hand_out()

    def until(self, end: float) -> Sequence:
        """Let everything happen up to a time; arrivals come before a timer of the same moment."""
        while True:
            name = min(self.due, key=lambda n: (self.due[n], n))
            wake = self.strategy.wake_at()
            moment = min(self.due[name], math.inf if wake is None else wake)
            if moment > end:
                self.clock.t = end
                return self
            self.clock.t = moment
            if self.due.get(name) == moment:
                del self.due[name]
                self.arrive(name, {"w": self._unit(name)}, step_s=self._step_s(name))
            else:
                self.wake()
            self._hand_out()

    def orders_of(self, name: str) -> list[tuple[float, int]]:
        return [(t, steps) for t, to, steps in self.given if to == name]

    def groups(self) -> list[tuple[float, float, str]]:
        """T_exp, T_late and who is yet to come, of the groups there are now."""
        return [
            (round(g.expected, 3), round(g.latest, 3), "".join(sorted(g.members)))
            for g in self.strategy._groups
        ]

    def _step_s(self, name: str) -> float:
        seconds = self.seconds[name]
        return seconds(len(self.orders_of(name)) - 1) if callable(seconds) else seconds

    def _unit(self, name: str) -> np.ndarray:
        return np.array([float(n == name) for n in self.seconds])

    def _hand_out(self) -> None:
        for name in sorted(self.seconds):
            plan = None if name in self.orders else self.ask(name)
            if plan is not None:
                self.given.append((round(self.clock.t, 2), name, plan.steps))
                self.due[name] = round(self.clock.t + plan.steps * self._step_s(name), 6)

    def _take(self, new: Any) -> bool:
        before = self.now["w"]
        made = super()._take(new)
        if made:
            moved = zip(self.seconds, before - self.now["w"], strict=True)
            weights = {name: float(weight) for name, weight in moved if weight}
            self.made.append((round(self.clock.t, 2), weights))
        return made


def same(found: list[Version], expected: list[Version]) -> None:
    assert [t for t, _ in found] == [t for t, _ in expected]
    for (t, weights), (_, by_hand) in zip(found, expected, strict=True):
        assert weights == pytest.approx(by_hand, abs=2e-6), f"the version made at {t} s"


def test_three_sites_that_meet_every_hundred_seconds() -> None:
    """A first update makes a version even while groups wait; then the site joins one of them."""
    run = Sequence({"a": 1.0, "b": 1.5, "c": 3.1}).until(100.0)
    assert run.groups() == [(200.0, 250.0, "a")]  # 100 steps; latest 100 + 1.5 * 100
    run.until(199.9)
    assert run.orders_of("b") == [(0.0, 100), (150.0, 33)]  # floor((200 - 150) / 1.5)
    run.until(300.0)
    assert run.orders_of("b")[2:] == [(200.0, 66), (300.0, 66)]
    run.until(500.0)
    assert run.orders_of("a") == [(100.0 * k, 100) for k in range(6)]
    assert run.orders_of("c") == [(0.0, 100), (310.0, 29), (400.0, 32), (500.0, 32)]
    assert run.groups() == [(600.0, 650.0, "abc")]
    fresh = 0.9 / 3
    one_old = fresh * HALF
    same(
        run.made,
        [
            (100.0, {"a": fresh}),
            (150.0, {"b": one_old}),  # one version was made since it began
            (200.0, {"a": one_old, "b": fresh}),
            (300.0, {"a": fresh, "b": fresh}),
            (310.0, {"c": fresh * 5**-0.5}),
            (400.0, {"a": one_old, "b": one_old, "c": fresh}),
            (500.0, {"a": fresh, "b": fresh, "c": fresh}),
        ],
    )
    assert len(run.until(700.0).made) == 9


def test_a_site_that_comes_too_late() -> None:
    """It waits for the next group's version, founds by its newest speed and by T_late."""
    run = Sequence({"a": 1.0, "b": lambda k: 4.0 if k == 2 else 1.24}).until(519.0)
    assert run.orders_of("b") == [(0.0, 100), (124.0, 61), (200.0, 80)]
    assert run.groups() == [(550.0, 600.0, "a")]
    run.until(520.0)
    # s = 0.1 * 1.24 + 0.9 * 4 = 3.724; joining: floor(30 / 3.724) = 8 < 20; founding:
    # floor((600 + 1 * 100 - 520) / 3.724) = 48. With the old speed weighing 0.9 it were 1.516.
    assert run.strategy.pace.step_s["b"] == pytest.approx(3.724)
    assert run.orders_of("b")[-1] == (520.0, 48)
    assert run.groups() == [(550.0, 600.0, "a"), (698.752, 788.128, "b")]
    run.until(579.6)
    # a: 148 steps are too many to join b, and 788 + 372 s are too far off: Q_max. b: 70.48 / 1.4884
    assert run.strategy.pace.step_s["b"] == pytest.approx(1.4884)
    assert run.orders_of("b")[-1] == (579.52, 47)
    assert run.groups() == [(650.0, 700.0, "ab")]
    run.until(650.0)
    assert run.orders_of("a")[-2:] == [(550.0, 100), (650.0, 100)]
    assert run.orders_of("b")[-1] == (650.0, 79)
    same(
        run.made,
        [
            (100.0, {"a": 0.45}),
            (124.0, {"b": 0.45 * HALF}),
            (200.0, {"a": 0.45 * HALF, "b": 0.45}),
            (350.0, {"a": 0.45}),  # the timer, without b
            (450.0, {"a": 0.45}),
            (550.0, {"a": 0.45, "b": 0.45 * THIRD}),  # b's late one, two versions old
            (579.52, {"b": 0.45 * HALF}),
            (650.0, {"a": 0.45 * HALF, "b": 0.45}),
        ],
    )


def test_eleven_versions_of_thirty_six_uploads() -> None:
    """Six first updates make six versions; were they kept for the groups there would be six."""
    speeds = {"a": 1.0, "b": 1.05, "c": 1.12, "d": 1.21, "e": 1.33, "f": 1.53}
    run = Sequence(speeds).until(199.9)
    assert run.given[6:] == [
        (100.0, "a", 100),
        (105.0, "b", 90),
        (112.0, "c", 78),
        (121.0, "d", 65),
        (133.0, "e", 50),
        (153.0, "f", 30),
    ]
    run.until(200.0)
    again = {"a": 100, "b": 95, "c": 89, "d": 82, "e": 75, "f": 65}
    assert run.given[12:] == [(200.0, name, steps) for name, steps in again.items()]
    run.until(640.0)
    first = [100.0, 105.0, 112.0, 121.0, 133.0, 153.0]
    expected = [
        (t, {name: 0.15 * (1 + k) ** -0.5})
        for k, (t, name) in enumerate(zip(first, speeds, strict=True))
    ]
    # a began with version 1, f with version 6
    expected += [(200.0, {name: 0.15 * (6 - k) ** -0.5 for k, name in enumerate(speeds)})]
    expected += [(t, dict.fromkeys(speeds, 0.15)) for t in (300.0, 400.0, 500.0, 600.0)]
    same(run.made, expected)
    assert len(run.made) == 11
    assert len(run.given) - len(run.due) == 36


def test_a_founded_group_has_at_least_the_least_steps() -> None:
    """19 steps would meet the other group: they are raised to Q_min, not replaced by Q_max."""
    run = Sequence({"a": 1.0, "c": 12.1}).until(1210.0)
    # joining: floor(90 / 12.1) = 7; founding: floor((1350 + 1 * 100 - 1210) / 12.1) = 19
    assert run.orders_of("c") == [(0.0, 100), (1210.0, 20)]
    assert run.groups() == [(1300.0, 1350.0, "a"), (1452.0, 1573.0, "c")]
    run.until(1452.0)
    assert run.orders_of("a")[-3:] == [(1300.0, 100), (1400.0, 52), (1452.0, 100)]
    # the fastest is assigned first: a founds, and c founds for the time after it
    assert run.orders_of("c")[-1] == (1452.0, 20)
    assert run.groups() == [(1552.0, 1602.0, "a"), (1694.0, 1815.0, "c")]
    same(
        run.made[12:],
        [
            (1210.0, {"c": 0.45 * 13**-0.5}),
            (1300.0, {"a": 0.45 * HALF}),
            (1400.0, {"a": 0.45}),
            (1452.0, {"a": 0.45, "c": 0.45 * THIRD}),
        ],
    )
