"""FedCompass's rules, one at a time."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from worlds.strategies.driven import Driven, close, delta, minus, theta

from strategies.fedcompass import FedCompass

Version = tuple[float, dict[str, float]]  # When it was made, and the weight of each site in it
HALF, THIRD = 2**-0.5, 3**-0.5  # s(1), s(2)


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
