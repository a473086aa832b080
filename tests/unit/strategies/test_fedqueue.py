"""FedQueue against decisions worked out by hand from its published rules (arXiv 2605.02125).

The sequences agree with what the authors' scheduler decides on the same uploads, but for the
timer, which starts with a round's first order here and with its first upload there.
"""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Message, RecordDict
from worlds.strategies.driven import Driven, close, delta, minus, theta

from flwr_hpc.protocol import TRAIN, Order, Status
from strategies.engine.state import SiteResult
from strategies.fedqueue import FedQueue

D = {name: delta(size, turn) for name, size, turn in (("a", 1, 0), ("b", 2, 1), ("c", 4, 2))}
PUBLISHED = {"staleness": "harmonic", "renormalise": True}  # as the authors' prototype weighs


def ask(run: Driven, names: str = "ab") -> dict[str, tuple[int, float]]:
    """Let sites be planned for, by name: steps and scale of the learning rate of who gets any."""
    plans = {name: run.ask(name) for name in names if name not in run.orders}
    given = {name: plan for name, plan in plans.items() if plan is not None}
    return {name: (plan.steps, round(plan.options["lr-scale"], 6)) for name, plan in given.items()}


def come(run: Driven, t: float, name: str, queued: float, step_s: float) -> bool:
    run.at(t)
    return run.arrive(name, D[name], queued=queued, step_s=step_s)


# ---- sequences of decisions ---------------------------------------------------------------------


def test_rounds_sized_to_the_wait() -> None:
    """Forecast, steps, scale, timer, cutoff: a 10 s per step and 100 s in the queue, b 20 and 600.

    b's third job waits for 2000 s: held back, it is merged with the weight of one round's
    staleness, and b has no work until then.
    """
    run = Driven(FedQueue(**PUBLISHED), "ab")
    assert ask(run) == {"a": (20, 1.0), "b": (20, 1.0)}
    assert not come(run, 300, "a", 100, 10)
    assert ask(run) == {}
    assert come(run, 1000, "b", 600, 20)
    one = minus(theta(), (0.5, D["a"]), (0.5, D["b"]))
    close(run.now, one)
    # q = 0.5 * 100 + 0.5 * 2 = 51: floor((3600 - 51 - 60) / 10); b: floor((3600 - 301 - 60) / 20)
    assert ask(run) == {"a": (348, 0.462644), "b": (161, 1.0)}
    assert not come(run, 4580, "a", 100, 10)
    assert come(run, 4820, "b", 600, 20)
    assert ask(run) == {"a": (346, 0.445087), "b": (154, 1.0)}
    assert not come(run, 8380, "a", 100, 10)
    run.at(8959)
    before, version = run.now, run.strategy.version
    run.at(8960)  # 4820 + 1.15 * 3600
    assert (version, run.strategy.version) == (2, 3)
    close(run.now, minus(before, (1.0, D["a"])))
    assert ask(run) == {"a": (345, round(154 / 345, 6))}
    before = run.now
    assert not come(run, 9900, "b", 2000, 20)
    assert ask(run) == {}
    assert come(run, 12510, "a", 100, 10)
    close(run.now, minus(before, (2 / 3, D["a"]), (1 / 3, D["b"])))
    assert ask(run) == {"a": (344, 0.334302), "b": (115, 1.0)}
    before = run.now
    assert not come(run, 15410, "b", 600, 20)
    run.at(16650)
    assert run.strategy.version == 5
    close(run.now, minus(before, (1.0, D["b"])))


def test_a_site_that_has_not_reported_is_no_part_of_the_plan() -> None:
    """c's job waits for 5960 s. Counted with its 20 steps the others' rate fell to 0.6 %."""
    run = Driven(FedQueue(**PUBLISHED), "abc")
    assert ask(run, "abc") == dict.fromkeys("abc", (20, 1.0))
    come(run, 120, "a", 100, 1)
    come(run, 640, "b", 600, 2)
    run.at(4140)
    close(run.now, minus(theta(), (0.5, D["a"]), (0.5, D["b"])))
    assert ask(run) == {"a": (3489, 0.46403), "b": (1619, 1.0)}
    before = run.now
    assert not come(run, 6000, "c", 5960, 2)  # a round too late, and it waited too long
    assert ask(run, "c") == {}
    assert not come(run, 7729, "a", 100, 1)
    assert come(run, 7978, "b", 600, 2)
    close(run.now, minus(before, (0.4, D["a"]), (0.4, D["b"]), (0.2, D["c"])))
    assert ask(run, "abc") == {"a": (3464, 0.080543), "b": (1544, 0.180699), "c": (279, 1.0)}


def test_the_cutoff_counts_for_a_first_job() -> None:
    """b waits for 1400 s > q_init + 0.2 T: its update is held back in the very first round."""
    run = Driven(FedQueue(q_init=600.0, **PUBLISHED), "ab")
    ask(run)
    assert not come(run, 300, "a", 100, 10)
    assert come(run, 1800, "b", 1400, 20)
    one = minus(theta(), (1.0, D["a"]))
    close(run.now, one)
    assert ask(run) == {"a": (319, 0.398119)}  # b's would be floor((3600 - 1000 - 60) / 20) = 127
    assert come(run, 5090, "a", 100, 10)
    close(run.now, minus(one, (2 / 3, D["a"]), (1 / 3, D["b"])))


# ---- one rule each ------------------------------------------------------------------------------


def queued(waits: dict[str, float], step_s: dict[str, float], **arguments: Any) -> Driven:
    """A run after its first round, with known waits, taken as forecasts, and speeds."""
    arguments = {"round_s": 1000.0, "q_init": None, **arguments}
    run = Driven(FedQueue(**arguments), sites=waits)
    for name in waits:
        run.ask(name)
    for name, wait in waits.items():
        run.arrive(name, delta(0.0), queued=wait, step_s=step_s[name])
    assert run.strategy.version == 1
    return run


def asked(run: Driven, names: str = "ab") -> None:
    for name in names:
        assert run.ask(name) is not None


def test_steps() -> None:
    """E = max(floor(max(0.5, T - q - margin) / s), 20); lr is scaled by E_min / E."""
    run = queued({"a": 100.0, "b": 340.0, "c": 5000.0}, {"a": 2.0, "b": 7.0, "c": 1.0})
    plans = {name: run.ask(name) for name in "abc"}
    # (1000 - 100 - 60) / 2 = 420; 600 / 7 = 85.7; 0.5 / 1 -> 20
    assert {name: plan.steps for name, plan in plans.items()} == {"a": 420, "b": 85, "c": 20}
    assert [plans[n].options["lr-scale"] for n in "abc"] == pytest.approx([20 / 420, 20 / 85, 1.0])


def test_rates_are_scaled_by_the_sites_that_are_there() -> None:
    """c, whose 20 steps were the least, has left: E_min is b's 85 steps."""
    run = queued({"a": 100.0, "b": 340.0, "c": 5000.0}, {"a": 2.0, "b": 7.0, "c": 1.0})
    run.strategy.sites["c"].offline_since = 0.0
    plans = [run.ask(name) for name in "ab"]
    assert [p.options["lr-scale"] for p in plans] == pytest.approx([85 / 420, 1.0])


def test_without_q_init_the_first_wait_is_the_forecast() -> None:
    """And is not late, however long; a site without one has its whole round for work."""
    run = Driven(FedQueue(q_init=None), "abc")
    asked(run, "abc")
    come(run, 120, "a", 100, 1)
    come(run, 640, "b", 600, 2)
    run.at(4140)
    assert ask(run) == {"a": (3440, round(1470 / 3440, 6)), "b": (1470, 1.0)}
    before = run.now
    come(run, 8000, "c", 5960, 2)
    come(run, 8000, "a", 100, 1)
    assert come(run, 8000, "b", 600, 2)
    stale = 2**-0.5 / 3
    close(run.now, minus(before, (1 / 3, D["a"]), (1 / 3, D["b"]), (stale, D["c"])))


def test_before_anything_is_known() -> None:
    """The least there is; and no scaling where it is switched off."""
    run = Driven(FedQueue(scale_lr=False, min_steps=30))
    plan = run.ask("a")
    assert (plan.steps, dict(plan.options)) == (30, {})


def test_forecast() -> None:
    """q <- b q_seen + (1 - b) q with b = 0.5, of the waits since the last arrival."""
    run = queued({"a": 100.0}, {"a": 1.0})
    run.ask("a")
    run.arrive("a", delta(0.0), queued=300.0)
    assert run.strategy.pace.queue_s["a"] == 200.0
    assert run.ask("a").steps == 1000 - 200 - 60


def test_a_successor_that_queues_while_its_predecessor_trains_is_no_wait() -> None:
    """What its job waited stands in the ledger; the site has waited for nothing."""
    order = Order("k", "a", 0, "train", 0, 20)
    status = Status("done", "a", ledger={"a0": {"queue": 100.0}, "a1": {"queue": 900.0}})
    reply = Message(RecordDict(), 1, TRAIN)
    assert SiteResult(order, None, None, {}, reply, status).queued_s == 0.0
    status = Status("done", "a", ledger=status.ledger, queued_s=100.0)
    assert SiteResult(order, None, None, {}, reply, status).queued_s == 100.0


def test_admission() -> None:
    """A job that waited longer than q + 0.2 T is merged one round later, s = 2^-0.5."""
    run = queued({"a": 100.0, "b": 100.0}, {"a": 1.0, "b": 1.0})
    start = run.now
    asked(run)
    run.arrive("a", D["a"], queued=300.0)  # just admitted: 300 <= 100 + 200
    assert run.arrive("b", D["b"], queued=301.0)  # not: held back, the round ends without it
    first = minus(start, (1.0, D["a"]))
    close(run.now, first)
    assert not run.wake()  # and makes no version of its own
    asked(run, "a")
    assert run.ask("b") is None
    assert run.arrive("a", D["c"])
    close(run.now, minus(first, (1 / 2, D["c"]), (1 / 2 * 2**-0.5, D["b"])))
    assert len(run.strategy.buffer) == 0
    asked(run)


def test_a_round_waits_for_a_straggler_of_the_last_one() -> None:
    """It ends when every site has come once, or by its timer."""
    run = queued({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0})
    begun = run.clock.now()
    asked(run)
    run.arrive("a", D["a"])
    run.at(begun + 1150.0)
    assert run.strategy.version == 2
    asked(run, "a")
    assert not run.arrive("a", D["a"])  # b works on the order of the round before still
    before = run.now
    assert run.arrive("b", D["b"])
    close(run.now, minus(before, (1 / 2, D["a"]), (1 / 2 * 2**-0.5, D["b"])))


def test_weights() -> None:
    """n_k / n s(u): b's update of 30 examples is two rounds old, a's of 10 is fresh."""
    run = queued({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0})
    asked(run)
    for _ in range(2):
        begun = run.clock.now()
        run.arrive("a", delta(0.0))
        run.at(begun + 1150.0)
        run.ask("a")
    before = run.now
    run.arrive("b", D["b"], examples=30)
    assert run.arrive("a", D["a"], examples=10)
    close(run.now, minus(before, (0.25, D["a"]), (0.75 * 3**-0.5, D["b"])))


@pytest.mark.parametrize(
    ("arguments", "fresh", "stale"),
    [
        ({}, 0.5, 0.5 * 2**-0.5),
        ({"staleness": "harmonic"}, 0.5, 0.25),
        ({"staleness": "harmonic", "renormalise": True}, 2 / 3, 1 / 3),
        ({"staleness": "harmonic", "a": 0.5, "renormalise": True}, 0.6, 0.4),
        ({"staleness": "constant", "renormalise": True}, 0.5, 0.5),
    ],
)
def test_staleness_and_renormalised_weights(
    arguments: dict[str, Any], fresh: float, stale: float
) -> None:
    """Options of the authors' code: a fresh update with one that is a round old."""
    run = queued({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}, **arguments)
    asked(run)
    run.arrive("a", delta(0.0)), run.arrive("b", D["b"], queued=201.0)
    asked(run, "a")
    before = run.now
    assert run.arrive("a", D["a"])
    close(run.now, minus(before, (fresh, D["a"]), (stale, D["b"])))


def test_a_round_whose_updates_are_all_late_goes_on() -> None:
    """With what there is."""
    run = queued({"a": 100.0, "b": 100.0}, {"a": 1.0, "b": 1.0})
    start = run.now
    asked(run)
    run.arrive("a", D["a"], queued=900.0)
    assert run.arrive("b", D["b"], queued=900.0)
    close(run.now, minus(start, (0.5, D["a"]), (0.5, D["b"])))


def test_a_held_update_goes_on_when_everybody_else_is_gone() -> None:
    """b's alone: nothing else would ever end the round."""
    run = queued({"a": 100.0, "b": 100.0}, {"a": 1.0, "b": 1.0})
    asked(run)
    run.arrive("a", D["a"])
    assert run.arrive("b", D["b"], queued=900.0)
    before = run.now
    assert run.ask("b") is None
    assert run.wake()
    close(run.now, minus(before, (2**-0.5, D["b"])))


def test_timer() -> None:
    """A round ends after 1.15 T with whoever is there; without anybody it goes on."""
    run = queued({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0})
    start, begun = run.now, run.clock.now()
    asked(run)
    run.at(begun + 1150.0)
    assert (run.strategy.version, run.strategy.wake_at()) == (1, begun + 2300.0)
    run.arrive("a", D["a"])
    run.at(begun + 2300.0)
    close(run.now, minus(start, (1.0, D["a"])))


def test_a_round_survives_an_interruption() -> None:
    """What is held back, who is awaited and the forecasts are those of before."""
    run = queued({"a": 100.0, "b": 100.0}, {"a": 1.0, "b": 1.0})
    asked(run)
    run.arrive("a", D["a"]), run.arrive("b", D["b"], queued=900.0)
    asked(run, "a")
    again = Driven(FedQueue(round_s=1000.0, q_init=None), sites="ab")
    again.strategy.version = run.strategy.version
    again.restore(run)
    before = again.now
    assert again.ask("b") is None
    assert again.arrive("a", D["a"], queued=0.0)
    close(again.now, minus(before, (0.5, D["a"]), (0.5 * 2**-0.5, D["b"])))
