"""FedBackfill with barriers: who holds a window up, for how long, and what it makes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from worlds.strategies.driven import Driven, close, delta, minus, theta

from strategies import Plan
from strategies.fedbackfill_rounds import FedBackfillRounds

BALANCED = {"balance": True, "balance_arrivals": True}
PLAIN = {"momentum": 0.0, "average": None, **BALANCED}


class Rounds(Driven):
    """Hands every order in at once, but to the sites that `queue`."""

    def ask(self, name: str, ahead: bool = False, *, queue: bool = False) -> Plan | None:
        plan = super().ask(name, ahead)
        if plan is not None and not queue:
            self.hand_in(name, plan)
        return plan

    def hand_in(self, name: str, plan: Plan) -> None:
        """The site has an allocation: its order is bound to the newest weights."""
        assert plan.bind is not None
        bound = plan.bind(None)
        order, _, _ = self.orders[name]
        order = type(order)(**{**vars(order), "version": bound.version})
        self.orders[name] = order, bound.arrays, self.clock.now()

    def ask_all(self, names: str) -> list[bool]:
        return [self.ask(name) is not None for name in names]


class Shares:
    """g_k, computed here from the arrivals."""

    def __init__(self, sites: str) -> None:
        self.count = len(sites)
        self.steps: dict[str, float] = {}
        self.frequency: dict[str, float] = {}

    def arrived(self, name: str, steps: int) -> None:
        old, new = self.steps.get(name, float(steps)), 1 / (8 * self.count)
        self.steps[name] = 0.7 * old + 0.3 * steps
        self.frequency.setdefault(name, 1 / self.count)
        self.frequency = {n: (1 - new) * f + new * (n == name) for n, f in self.frequency.items()}

    def of(self, name: str) -> float:
        g = math.sqrt(np.mean(list(self.steps.values())) / self.steps[name]) / self.count
        return float(g * min(3.0, max(1 / 3, 1 / self.count / self.frequency[name])))


# ---- what a window makes ------------------------------------------------------------------------


def test_a_window_of_two_sites_by_hand():
    """One Nesterov step of both, each by its g_k: not normalised, and the mean of it published."""
    run = Rounds(FedBackfillRounds(outer_lr=0.9, momentum=0.8, average=4.0, **BALANCED), "ab")
    here, mean, m, t = theta(), theta(), dict.fromkeys(theta(), 0.0), 0.0
    shares = Shares("ab")
    for k in range(3):
        moved = {"a": delta(1.0 + k, turn=k), "b": delta(2.0, turn=1.0 - k)}
        run.ask_all("ab")
        for name, done in ("a", 80 - k), ("b", 10):
            assert run.arrive(name, moved[name], steps=done) == (name == "b")
            shares.arrived(name, done)
        rho = {name: shares.of(name) for name in "ab"}
        whole = sum(rho.values())
        d = {key: sum(rho[name] * moved[name][key] for name in "ab") for key in here}
        m = {key: 0.8**whole * m[key] + d[key] for key in here}
        here = minus(here, (0.9, d), (0.9 * 0.8 * whole, m))
        t += whole
        c = min(1.0, 5.0 * whole / (t + 4.0))
        mean = {key: (1 - c) * mean[key] + c * here[key] for key in here}
        close(run.now, here)
        close({key: a.numpy() for key, a in run.strategy.published().items()}, mean)
    assert rho["b"] > 2 * rho["a"]  # of few steps


def test_a_window_of_a_part_of_the_sites_makes_a_part_of_a_step():
    """One of four sites moves the model by a quarter, less what it arrives more often."""
    run, shares = Rounds(FedBackfillRounds(outer_lr=1.0, **PLAIN), "abcd"), Shares("abcd")
    run.ask("a")
    assert run.arrive("a", delta(4.0), steps=10)
    shares.arrived("a", 10)
    assert shares.of("a") == pytest.approx(0.25 * 0.25 / (0.25 * 31 / 32 + 1 / 32))
    close(run.now, minus(theta(), (shares.of("a"), delta(4.0))))


def test_a_late_update_goes_into_the_next_window():
    """With s = (1 + 1 / N)^-1/2 against the weights it started from, and as no report of it."""
    run = Rounds(FedBackfillRounds(round_s=100.0, outer_lr=1.0, **PLAIN), "ab")
    shares = Shares("ab")
    run.ask_all("ab")
    run.arrive("a", delta(1.0), steps=10)
    shares.arrived("a", 10)
    run.at(33.0)
    assert run.strategy.version == 1  # without b
    first = minus(theta(), (shares.of("a"), delta(1.0)))
    close(run.now, first)
    run.ask("a")
    assert not run.arrive("b", delta(6.0), steps=20)
    run.at(1000.0)
    assert run.strategy.version == 1  # the window waits for a report of its own
    assert len(run.strategy.pending()) == 1
    run.ask("b")
    run.arrive("a", delta(2.0), steps=30)
    assert run.arrive("b", delta(3.0), steps=40)
    for name, steps in ("b", 20), ("a", 30), ("b", 40):
        shares.arrived(name, steps)
    late = shares.of("b") * (1 + 1 / 2) ** -0.5
    fresh = [(shares.of("a"), delta(2.0)), (shares.of("b"), delta(3.0))]
    close(run.now, minus(first, *fresh, (late, delta(6.0))))


# ---- when it closes -----------------------------------------------------------------------------


def test_the_grace_is_a_share_of_the_round():
    """0.5 x 40 s after the second of four reports, wherever the third then is."""
    run = Rounds(FedBackfillRounds(round_s=40.0, grace=0.5), "abcd")
    run.ask_all("abcd")
    run.at(10.0)
    run.arrive("a", delta(1.0))
    assert run.strategy.wake_at() is None
    run.at(12.0)
    run.arrive("b", delta(1.0))
    assert run.strategy.wake_at() == 32.0
    run.at(20.0)
    run.arrive("c", delta(1.0))
    assert run.strategy.wake_at() == 32.0
    assert run.ask_all("abc") == [False] * 3  # a barrier
    run.at(31.9)
    assert run.strategy.version == 0
    run.at(32.0)
    assert run.strategy.version == 1
    assert run.ask_all("abc") == [True] * 3


def test_the_grace_adapts_to_what_orders_take():
    """R = steps x seconds per step + what an order costs besides, all moving averages."""
    run = Rounds(FedBackfillRounds(grace=0.5), "ab")
    step_s, besides, steps = 2.0, 10.0, 10.0
    for new_step_s, new_besides in [(2.0, 10.0), (2.0, 10.0), (8.0, 70.0)]:
        run.ask_all("ab")
        done = run.orders["a"][0].steps
        run.at(run.clock.now() + done * new_step_s + new_besides)
        run.arrive("a", delta(0.0), step_s=new_step_s)
        step_s = 0.7 * step_s + 0.3 * new_step_s
        besides = 0.7 * besides + 0.3 * new_besides
        steps = 0.7 * steps + 0.3 * done
        closes = run.clock.now() + 0.5 * (steps * step_s + besides)
        assert run.strategy.wake_at() == pytest.approx(closes)
        version = run.strategy.version
        run.at(closes - 0.01)
        assert run.strategy.version == version
        run.at(closes + 0.01)
        assert run.strategy.version == version + 1
        run.fail("b")
    assert steps * step_s + besides > 75  # from 30: the round has become longer


def test_the_queue_is_no_part_of_a_round():
    """An order that was three hours in the queue again does not make the grace hours long."""
    run = Rounds(FedBackfillRounds(grace=0.5), "ab")
    for queued in (0.0, 10_000.0):
        run.ask_all("ab")
        run.at(run.clock.now() + 20.0 + queued)
        run.arrive("a", delta(0.0), queued=queued, steps=10)
        assert run.strategy.wake_at() == pytest.approx(run.clock.now() + 0.5 * 20.0)
        run.at(run.clock.now() + 20.0)
        run.fail("b")


def test_all_reports_close_a_window_at_once():
    """Nobody is left to be waited for."""
    run = Rounds(FedBackfillRounds(round_s=100.0), "abc")
    run.ask_all("abc")
    run.arrive("a", delta(1.0)), run.arrive("b", delta(1.0))
    assert run.arrive("c", delta(1.0))


# ---- who holds it up ----------------------------------------------------------------------------


@pytest.mark.parametrize(("sites", "quorum", "needed"), [
    ("a", None, 1), ("ab", None, 1), ("abc", None, 2), ("abcd", None, 2), ("abcde", None, 3),
    ("abcd", 1, 1), ("abcd", 3, 3), ("abcd", 9, 4),
])  # fmt: skip
def test_the_quorum(sites, quorum, needed):
    """Half of the sites, or as configured, but never more than there are at work."""
    run = Rounds(FedBackfillRounds(quorum=quorum), sites)
    run.ask_all(sites)
    assert run.strategy.needed() == needed


def test_a_site_in_the_queue_holds_no_window():
    """It joins the window in which its order is handed in, with the weights of that."""
    run = Rounds(FedBackfillRounds(quorum=3, round_s=100.0), "abc")
    run.ask("a")
    waiting = {name: run.ask(name, queue=True) for name in "bc"}
    assert run.strategy.needed() == 1
    assert run.arrive("a", delta(1.0))  # nobody else is at work
    run.ask("a")
    run.hand_in("b", waiting["b"])
    assert run.strategy.working == {"a": 1, "b": 1}
    assert run.strategy.needed() == 2
    assert not run.arrive("a", delta(1.0))
    assert run.ask("a") is None
    assert run.arrive("b", delta(1.0))


@pytest.mark.parametrize("how", ["offline", "queued", "ended", "failed"])
def test_a_dead_site_holds_no_window(how):
    """Its going lowers the quorum, from the report on that makes it then."""
    run = Rounds(FedBackfillRounds(quorum=2, round_s=100.0), "ab")
    run.ask_all("ab")
    run.at(10.0)
    run.arrive("a", delta(1.0))
    run.at(20.0)
    assert run.strategy.wake_at() is None
    if how == "failed":
        run.fail("b")
        assert run.strategy.wake_at() == 20.0  # there is nobody left
    elif how == "offline":
        run.strategy.sites["b"].offline_since = 20.0
    else:
        run.strategy.sites["b"].allocation_state = how
    if how != "failed":
        assert run.strategy.wake_at() == 43.0
    run.at(43.0)
    assert run.strategy.version == 1


def test_a_site_that_never_answers_holds_no_later_window():
    """One window may wait for its grace; those after it do not know of the site."""
    run = Rounds(FedBackfillRounds(round_s=100.0), "ab")
    run.ask_all("ab")
    run.arrive("a", delta(1.0))
    run.at(33.0)
    assert run.strategy.version == 1
    for k in range(5):
        run.ask("a")
        run.at(run.clock.now() + 50.0)
        assert run.arrive("a", delta(1.0)), k


# ---- the rest -----------------------------------------------------------------------------------


def test_orders_are_sized_as_fedbackfill_sizes_them():
    """Five times what an order costs besides: 150 s, 75 steps of 2 s."""
    run = Rounds(FedBackfillRounds(), "a")
    assert run.ask("a").steps == 10
    run.at(50.0)
    run.arrive("a", delta(0.0), step_s=2.0)
    assert run.ask("a").steps == 75


def test_state_keeps_an_open_window():
    """Another process, whose clock is another, closes it after what was left of the grace."""
    run = Rounds(FedBackfillRounds(round_s=100.0, grace=0.5), "abcd")
    run.ask_all("abcd")
    run.at(20.0)
    run.arrive("a", delta(1.0)), run.arrive("b", delta(2.0))
    run.at(22.0)
    left = run.strategy.wake_at() - 22.0
    state = run.save()
    other = Rounds(FedBackfillRounds(round_s=100.0, grace=0.5), "abcd")
    other.restore(run)
    assert other.strategy.wake_at() == pytest.approx(left)
    assert other.strategy.reported() == {"a", "b"}
    assert other.save() == state
    run.at(22.0 + left), other.at(left)
    assert run.strategy.version == other.strategy.version == 1
    close(other.now, run.now)


@pytest.mark.parametrize("arguments", [{"quorum": 0}, {"grace": -0.1}])
def test_nonsense_is_refused(arguments):
    """At once, naming what it was given."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        FedBackfillRounds(**arguments)
