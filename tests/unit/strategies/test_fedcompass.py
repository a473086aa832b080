"""FedCompass against sequences of decisions worked out by hand from its published rules.

Times, orders, versions and weights were computed from the rules of arXiv 2309.14675 (Q_min 20,
Q_max 100, lambda 1.5, speed average 0.9, alpha 0.9, s(tau) = (1 + tau)^-0.5) and agree with what
the authors' scheduler decides on the same uploads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from worlds.driven import Driven, close, delta, minus, theta

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


# ---- sequences of decisions ---------------------------------------------------------------------


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


# ---- one rule each ------------------------------------------------------------------------------


def compass(speeds: tuple[float, ...] = (1.0, 2.0, 5.0), **arguments: Any) -> Driven:
    """Sites a, b and c whose first updates have come, with 1, 2 and 5 seconds per step."""
    run = Driven(FedCompass(**arguments))
    for name, step_s in zip("abc", speeds, strict=True):
        assert run.ask(name).steps == 100  # Q_max, until the speed is known
        run.arrive(name, delta(0.0), step_s=step_s)
    return run


def test_a_first_update_is_merged_at_once() -> None:
    """With alpha / N, which nothing divides again."""
    run = Driven(FedCompass(alpha=0.6))
    run.ask("a")
    assert run.arrive("a", delta(3.0))
    close(run.now, minus(theta(), (0.2, delta(3.0))))


def test_groups() -> None:
    """A site founds a group with Q_max steps; the next joins with the Q that arrives together."""
    run = compass()
    assert run.ask("a").steps == 100  # founds: arrives at 100, latest 150
    # b: floor(100 / 2) = 50 lies in [20, 100]
    assert run.ask("b").steps == 50
    # c: floor(100 / 5) = 20, just so
    assert run.ask("c").steps == 20
    assert len(run.strategy._groups) == 1


def test_a_group_is_founded_for_the_next_meeting() -> None:
    """Too late to join: arrive when the group's fastest, let go at its latest, could be back."""
    run = compass()
    run.ask("a")  # arrives at 100, latest 150
    run.at(10.0)
    # c: floor(90 / 5) = 18 < 20; a is back at 150 + 1 * 100 = 250: floor(240 / 5) = 48
    assert run.ask("c").steps == 48
    group = run.strategy._groups[1]
    assert (group.expected, group.latest) == (10 + 48 * 5, 10 + 1.5 * 48 * 5)


def test_who_has_arrived_counts_as_a_groups_fastest() -> None:
    """a, the fastest, has arrived already and will go on when its group is fired."""
    run = compass(speeds=(1.0, 2.0, 8.0))
    run.ask("a"), run.ask("b")  # both arrive at 100, latest 150
    run.at(90.0)
    run.arrive("a", delta(1.0))
    # c: floor((150 + 1 * 100 - 90) / 8) = 20; by b's speed it were floor(260 / 8) = 32
    assert run.ask("c").steps == 20


def test_a_site_joins_the_group_with_most_steps() -> None:
    """b fits both groups: 45 steps with the first, 80 with the second."""
    run = compass()
    run.ask("a")
    run.at(10.0)
    run.ask("c")  # a second group, at 250
    run.at(90.0)
    assert run.ask("b").steps == 80
    assert [g.members for g in run.strategy._groups] == [["a"], ["c", "b"]]


def test_of_equals_the_youngest_group_is_joined() -> None:
    """Both have room for 25 steps and a bit."""
    run = compass(speeds=(1.0, 4.0, 1.0))
    run.ask("a")  # arrives at 100
    run.strategy._groups.append(type(run.strategy._groups[0])(101.0, 151.5, ["c"]))
    assert run.ask("b").steps == 25
    assert [g.members for g in run.strategy._groups] == [["a"], ["c", "b"]]


def test_a_group_makes_a_version_when_all_are_there() -> None:
    """Each delta by alpha / N s(tau), no further normalisation; who arrived early waits."""
    run = compass()
    before = run.now
    run.ask("a"), run.ask("b")
    run.at(99.0)
    assert not run.arrive("a", delta(1.0))
    assert run.ask("a") is None  # waits for its group
    assert run.arrive("b", delta(2.0, turn=1.0))
    close(run.now, minus(before, (0.3, delta(1.0)), (0.3, delta(2.0, turn=1.0))))
    assert run.ask("a").steps == 100


def test_the_sites_of_a_fired_group_are_assigned_fastest_first() -> None:
    """a, asked first, is the slowest: it must not be the one that founds."""
    run = compass(speeds=(5.0, 2.0, 1.0))
    for name in "cba":
        run.ask(name)
    run.at(100.0)
    for name in "abc":
        run.arrive(name, delta(1.0), step_s={"a": 5.0, "b": 2.0, "c": 1.0}[name])
    assert [run.ask(name).steps for name in "abc"] == [20, 50, 100]
    assert [g.members for g in run.strategy._groups] == [["c", "b", "a"]]


def test_an_absent_site_of_a_fired_group_is_not_assigned() -> None:
    """Its group would wait for an order that nobody has."""
    run = compass()
    run.ask("a"), run.ask("b")
    run.arrive("a", delta(1.0)), run.arrive("b", delta(1.0), step_s=2.0)
    run.strategy.sites["b"].offline_since = 0.0
    run.ask("a")
    assert [g.members for g in run.strategy._groups] == [["a"]]
    run.strategy.sites["b"].offline_since = None
    run.clock.t = 20.0
    assert run.ask("b").steps == 40


def test_a_group_goes_on_at_its_latest_time() -> None:
    """The straggler's delta comes with the next group, s = (1 + 1)^-0.5, and with no other."""
    run = compass()
    start = run.now
    run.ask("a"), run.ask("b")
    run.at(100.0)
    run.arrive("a", delta(1.0))
    assert run.strategy.wake_at() == 150.0
    run.at(150.0)
    first = minus(start, (0.3, delta(1.0)))
    close(run.now, first)
    run.ask("a")
    run.at(160.0)
    assert not run.arrive("b", delta(2.0), step_s=2.0)  # kept for the next group
    assert run.ask("b") is not None  # and free meanwhile
    assert run.strategy._groups[0].members == ["a", "b"]
    run.at(250.0)
    run.arrive("a", delta(4.0))
    assert run.arrive("b", delta(8.0), step_s=2.0)
    late = 0.3 * HALF
    close(run.now, minus(first, (0.3, delta(4.0)), (0.3, delta(8.0)), (late, delta(2.0))))


def test_a_late_update_makes_no_version_of_its_own() -> None:
    """Though no group is left that it could go with."""
    run = compass()
    run.ask("b")  # founds: arrives at 200, latest 300
    run.at(300.0)
    assert run.strategy._groups == []
    assert not run.arrive("b", delta(2.0), step_s=2.0)
    run.ask("b")
    assert run.arrive("b", delta(1.0), step_s=2.0)


def test_updates_that_are_always_late_are_merged_all_the_same() -> None:
    """Where every job waits for longer than any group: at the latest time of the next group."""
    run = compass()
    before = run.now
    run.ask("b")  # founds: arrives at 200, latest 300
    run.at(1000.0)
    assert not run.arrive("b", delta(2.0), step_s=2.0, queued=800.0)
    run.ask("b")
    run.at(1299.0)
    assert run.strategy.version == 3
    run.at(1300.0)
    assert run.strategy.version == 4
    close(run.now, minus(before, (0.3, delta(2.0))))


def test_an_arrival_at_the_latest_time_is_in_time() -> None:
    """Late is what comes after it."""
    run = compass()
    run.ask("a"), run.ask("b")
    run.arrive("a", delta(1.0))
    run.clock.t = 150.0
    assert run.arrive("b", delta(1.0), step_s=2.0)


def test_first_updates_and_groups_survive_an_interruption() -> None:
    """A site that has been merged once is not taken for a new one, and nobody's turn is lost."""
    run = compass(speeds=(5.0, 2.0, 1.0))
    for name in "cba":
        run.ask(name)
    run.at(100.0)
    for name, step_s in (("a", 5.0), ("b", 2.0), ("c", 1.0)):
        run.arrive(name, delta(1.0), step_s=step_s)
    again = Driven(FedCompass())
    again.restore(run)
    assert [again.ask(name).steps for name in "abc"] == [20, 50, 100]
    assert not again.arrive("a", delta(1.0), step_s=5.0)


def test_an_order_given_up_is_replaced_by_what_still_fits() -> None:
    """A run that was interrupted for long sends a new order in the place of one it gave up."""
    run = compass()
    run.ask("a"), run.ask("b")
    del run.orders["b"]
    run.at(30.0)
    assert run.ask("b").steps == 35
    del run.orders["b"]
    run.at(95.0)
    assert run.ask("b").steps == 20


def test_normalise_is_an_option() -> None:
    """The weights of a version sum to alpha before the staleness."""
    run = compass(normalise=True)
    before = run.now
    run.ask("a"), run.ask("b")
    run.arrive("a", delta(1.0))
    run.arrive("b", delta(3.0))
    close(run.now, minus(before, (0.45, delta(1.0)), (0.45, delta(3.0))))


@pytest.mark.parametrize(
    ("arguments", "weight"),
    [
        ({"staleness": "constant"}, 1.0),
        ({"staleness": "polynomial"}, 3**-0.5),
        ({"staleness": "polynomial", "a": 1.0}, 1 / 3),
        ({"staleness": "hinge", "a": 3.0, "b": 1.0}, 1 / 4),
        ({"staleness": "hinge"}, 1.0),
        ({"staleness": "harmonic", "a": 0.5}, 1 / 2),
        ({"staleness": "exponential", "a": 0.5}, math.exp(-1)),
    ],
)
def test_staleness_is_an_option(arguments: dict[str, Any], weight: float) -> None:
    """Of c's first update: two versions were made since it began."""
    run = Driven(FedCompass(**arguments))
    for name in "cab":
        run.ask(name)
    run.arrive("a", delta(0.0)), run.arrive("b", delta(0.0))
    before = run.now
    run.arrive("c", delta(2.0))
    close(run.now, minus(before, (0.3 * weight, delta(2.0))))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"staleness": "cubic"}, "staleness='cubic' is not known. Valid: constant, polynomial"),
        ({"b": 4.0}, "b=4.0 does not go with staleness='polynomial', it has: a"),
        ({"staleness": "constant", "a": 1.0}, "staleness='constant', it has: no parameter"),
    ],
)
def test_a_staleness_that_makes_no_sense_is_refused(arguments: dict[str, Any], words: str) -> None:
    """Before anything starts, with the valid choices."""
    with pytest.raises(ValueError, match=re.escape(words)):
        FedCompass(**arguments)


def test_an_update_of_no_steps_never_weighs() -> None:
    """Neither as a first one nor in a group, which does not wait for it either."""
    run = Driven(FedCompass())
    run.ask("a")
    assert not run.arrive("a", delta(5.0), steps=0)
    run = compass()
    before = run.now
    run.ask("a"), run.ask("b")
    run.arrive("a", delta(1.0))
    assert run.arrive("b", delta(5.0), steps=0)
    close(run.now, minus(before, (0.3, delta(1.0))))


def test_no_failed_site_is_waited_for() -> None:
    """Neither the rest of its group nor a group without anybody left."""
    run = compass()
    run.ask("a"), run.ask("b")
    run.arrive("a", delta(1.0))
    run.fail("b")
    assert run.wake()
    run.ask("c")
    run.fail("c")
    assert not run.wake()  # an empty group is forgotten
    assert run.strategy.wake_at() is None
