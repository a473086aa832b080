"""The strategies that gather updates over a window of time, against hand computations."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord
from worlds.strategies.driven import Driven, close, delta, minus, theta
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import as_numpy, initial_arrays

from strategies import Runtime
from strategies.decoupled_diloco import DecoupledDiLoCo
from strategies.fedavg import FedAvg
from strategies.fedqueue import FedQueue

# ---- FedAvg -------------------------------------------------------------------------------------


def asked(run: Driven, names: str = "abc") -> Driven:
    for name in names:
        run.ask(name)
    return run


def test_fedavg_by_hand():
    """theta - sum n_k / n delta_k, which is the weighted mean of the sites' weights."""
    run = asked(Driven(FedAvg()))
    assert not run.arrive("a", delta(1.0), examples=10)
    assert run.ask("a") is None  # waits for the next round
    assert not run.arrive("b", delta(2.0, turn=1.0), examples=30)
    assert run.arrive("c", delta(3.0, turn=2.0), examples=60)
    terms = (0.1, delta(1.0)), (0.3, delta(2.0, turn=1.0)), (0.6, delta(3.0, turn=2.0))
    close(run.now, minus(theta(), *terms))
    assert asked(run).strategy.awaited() == {"a", "b", "c"}


def test_fedavg_outer_lr_and_uniform_weights():
    """theta - 0.5 (delta_a + delta_b) / 2."""
    run = asked(Driven(FedAvg(outer_lr=0.5, weighted_by="uniform"), sites="ab"), "ab")
    run.arrive("a", delta(1.0), examples=1)
    run.arrive("b", delta(4.0), examples=1000)
    close(run.now, minus(theta(), (0.25, delta(1.0)), (0.25, delta(4.0))))


def test_the_deadline_closes_a_round_and_late_updates_are_merged_next():
    """With s = (1 + 1)^-0.5 on top of their share, so that they shorten the step."""
    run = asked(Driven(FedAvg(deadline_s=100.0)))
    run.arrive("a", delta(1.0))
    run.at(99.0)
    assert run.strategy.version == 0
    run.at(100.0)
    first = minus(theta(), (1.0, delta(1.0)))
    close(run.now, first)
    run.ask("a")
    assert not run.arrive("b", delta(6.0))  # late: waits for the window of the others
    run.ask("b")
    run.fail("c")
    run.ask("c")
    run.arrive("a", delta(2.0))
    run.arrive("b", delta(3.0))
    assert run.arrive("c", delta(5.0))
    quarter = [(0.25, delta(d)) for d in (2.0, 3.0, 5.0)]
    close(run.now, minus(first, *quarter, (0.25 * 0.5**0.5, delta(6.0))))


def test_late_updates_can_be_dropped():
    """late=drop: as if the site had not answered; it takes part in the next round."""
    run = asked(Driven(FedAvg(deadline_s=100.0, late="drop"), sites="ab"), "ab")
    run.arrive("a", delta(1.0))
    run.at(100.0)
    run.ask("a")
    assert not run.arrive("b", delta(60.0))
    assert run.ask("b") is not None
    run.arrive("a", delta(2.0))
    assert run.arrive("b", delta(4.0))
    close(run.now, minus(theta(), (1.0, delta(1.0)), (0.5, delta(2.0)), (0.5, delta(4.0))))


def test_a_late_update_makes_no_version_of_its_own():
    """It comes in the same breath as the one that closed the window, before anybody is asked."""
    run = asked(Driven(FedAvg(sites_per_round=2, over_selection=1.5)))
    run.arrive("a", delta(1.0))
    assert run.arrive("b", delta(2.0))
    assert not run.arrive("c", delta(3.0))
    assert not run.wake()
    assert run.strategy.version == 1


def test_over_selection():
    """Three of four are asked, two wanted: the third is not waited for, the fourth not asked."""
    run = Driven(FedAvg(sites_per_round=2, over_selection=1.5), sites="abcd")
    first, second, third = (n for n in "abcd" if run.ask(n) is not None)
    (fourth,) = set("abcd") - {first, second, third}
    run.fail(second)
    assert run.ask(fourth) is not None  # takes its place
    run.arrive(first, delta(1.0))
    assert run.arrive(fourth, delta(2.0))
    close(run.now, minus(theta(), (0.5, delta(1.0)), (0.5, delta(2.0))))


def test_below_the_quorum_the_window_is_opened_for_another_deadline():
    """One of three has reported: the round goes on, for whoever comes."""
    run = asked(Driven(FedAvg(deadline_s=100.0, quorum=2)))
    run.arrive("a", delta(1.0))
    run.at(150.0)
    assert (run.strategy.version, run.strategy.wake_at()) == (0, 200.0)
    run.arrive("b", delta(2.0))
    run.at(200.0)
    close(run.now, minus(theta(), (0.5, delta(1.0)), (0.5, delta(2.0))))


def test_the_grace_begins_with_the_quorum():
    """And does not outlast the deadline."""
    run = asked(Driven(FedAvg(deadline_s=100.0, quorum=2, grace_s=30.0)))
    run.at(50.0)
    run.arrive("a", delta(1.0))
    assert run.strategy.wake_at() == 100.0
    run.at(60.0)
    run.arrive("b", delta(1.0))
    assert run.strategy.wake_at() == 90.0
    run.at(90.0)
    assert run.strategy.version == 1


def test_the_grace_is_not_begun_anew():
    """Neither a further update nor a late quorum puts off when a window closes."""
    window = {"deadline_s": 100.0, "quorum": 1, "grace_s": 30.0}
    run, late = (asked(Driven(FedAvg(**window))) for _ in range(2))
    run.at(50.0)
    run.arrive("a", delta(1.0))
    run.at(60.0)
    run.arrive("b", delta(1.0))
    assert run.strategy.wake_at() == 80.0
    late.at(90.0)
    late.arrive("a", delta(1.0))
    assert late.strategy.wake_at() == 100.0


def test_a_round_ends_when_all_that_are_left_have_failed():
    """Nobody is waited for; what has come is merged."""
    run = asked(Driven(FedAvg()))
    run.arrive("a", delta(2.0))
    run.fail("b"), run.fail("c")
    assert run.wake()
    close(run.now, minus(theta(), (1.0, delta(2.0))))


def test_updates_without_examples_do_not_stop_the_run():
    """Sites that claim to have seen nothing count alike, and 0 / 0 is no weight."""
    run = asked(Driven(FedAvg(), sites="ab"), "ab")
    run.arrive("a", delta(1.0), examples=0)
    assert run.arrive("b", delta(3.0), examples=0)
    close(run.now, minus(theta(), (0.5, delta(1.0)), (0.5, delta(3.0))))


def test_state_keeps_what_is_left_of_a_window():
    """Times are kept as durations: another process has another clock."""
    run = asked(Driven(FedAvg(deadline_s=100.0, quorum=2)))
    run.at(30.0)
    run.arrive("a", delta(1.0))
    state = run.save()
    other = Driven(FedAvg(deadline_s=100.0, quorum=2))
    other.restore(run)
    assert other.strategy.wake_at() == 70.0
    assert other.strategy.reported() == {"a"}
    assert other.save() == state


@pytest.mark.parametrize(
    "arguments",
    [
        {"late": "x"},
        {"quorum": 0},
        {"over_selection": 0.5},
        {"deadline_s": 0},  # due at every moment
        {"deadline_s": -1.0},
        {"deadline_s": float("nan")},
        {"grace_s": -1.0},
        {"exponent": -0.5},  # the older, the heavier
    ],
)
def test_fedavg_refuses_nonsense(arguments):
    """At once, naming what it was given."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        FedAvg(**arguments)


# ---- Decoupled DiLoCo ---------------------------------------------------------------------------


def test_decoupled_diloco_by_hand():
    """Weights tokens^2 / steps, merged by length and direction, two Nesterov steps."""
    run = Driven(DecoupledDiLoCo(quorum=2, outer_lr=0.7, momentum=0.9), sites="ab")
    here, m = theta(), {k: np.zeros_like(v) for k, v in theta().items()}
    for k in (1.0, 2.0):
        asked(run, "ab")
        moved = [delta(k, turn=0.2), delta(3.0, turn=k)]
        run.arrive("a", moved[0], steps=10, tokens=1000)
        assert run.arrive("b", moved[1], steps=40, tokens=1500)
        weights = [1000**2 / 10, 1500**2 / 40]
        for name in here:
            norms = [np.linalg.norm(d[name]) for d in moved]
            units = [d[name] / n for d, n in zip(moved, norms, strict=True)]
            turned = sum(w * u for w, u in zip(weights, units, strict=True))
            radius = np.dot(weights, norms) / sum(weights)
            merged = radius * turned / np.linalg.norm(turned)
            m[name] = 0.9 * m[name] + merged
            here[name] = here[name] - 0.7 * (merged + 0.9 * m[name])
    close(run.now, here)


def test_decoupled_diloco_waits_for_quorum_and_grace_only():
    """One of two is enough; the other is merged with the next."""
    run = asked(Driven(DecoupledDiLoCo(quorum=1, grace_s=60.0), sites="ab"), "ab")
    run.at(10.0)
    run.arrive("a", delta(1.0), tokens=10)
    run.at(69.0)
    assert run.strategy.version == 0
    run.at(70.0)
    assert run.strategy.version == 1


# ---- over a grid --------------------------------------------------------------------------------


class HoldsBack(FedQueue):
    """Holds b's first update back, as FedQueue does with one whose job waited for long."""

    def on_result(self, arrival, staleness):
        if arrival.facility == "b" and arrival.order.version == 0:
            self._held.append("b")
        return super().on_result(arrival, staleness)


def told(strategy, sites: list[FakeSite], versions: int = 3) -> list[dict]:
    """Run, and return what was told of each version."""
    grid, log = FakeGrid(sites), []
    strategy.runtime = Runtime(
        clock=grid.clock, emit=lambda event, **fields: log.append((event, fields))
    )
    strategy.start(grid, initial_arrays(), versions, train_config=ConfigRecord({"steps": 10}))
    return [fields for event, fields in log if event == "aggregated"]


def test_what_is_dropped_is_not_told_as_merged():
    """late=drop: the log shows who has a part in a version, and no one else."""
    for late, facilities in (("drop", ["a"]), ("merge", ["a", "b"])):
        sites = [
            FakeSite("a", step_s=4.0),
            FakeSite("b", step_s=15.0),
        ]
        events = told(FedAvg(deadline_s=60.0, late=late), sites, 4)
        assert [e["facilities"] for e in events] == [["a"], ["a"], ["a"], facilities]
        assert events[-1]["staleness"].get("b") == (3 if late == "merge" else None)


def test_what_is_held_back_is_told_with_the_version_it_went_into():
    """An update that FedQueue admits a round later is told there, one version stale."""
    events = told(HoldsBack(round_s=100.0), [FakeSite("a"), FakeSite("b")])
    assert [e["facilities"] for e in events] == [["a"], ["a", "b"], ["a", "b"]]
    assert [e["staleness"].get("b") for e in events] == [None, 1, 0]


def test_the_proximal_term_reaches_the_order():
    """FedProx is trained at the sites: they must be told mu."""
    site = FakeSite("a")
    grid = FakeGrid([site])
    strategy = FedAvg(proximal_mu=0.03)
    strategy.runtime = Runtime(clock=grid.clock)
    strategy.start(grid, initial_arrays(), 2, train_config=ConfigRecord({"steps": 3}))
    assert [o.options["proximal-mu"] for o in site.orders if o.kind == "train"] == [0.03] * 2


def test_plain_client_apps_that_are_told_no_steps():
    """Under plain Flower nobody says how many steps were trained: that is not none."""
    sites = [
        FakeSite("x", 1.0, plain=True, examples=10),
        FakeSite("y", 2.0, plain=True, examples=30, step_s=5),
    ]
    grid = FakeGrid(sites)
    strategy = FedAvg()
    strategy.runtime = Runtime(clock=grid.clock)
    result = strategy.start(grid, initial_arrays(), 1)
    start = as_numpy(initial_arrays())
    for name, tensor in as_numpy(result.arrays).items():  # by examples: (10 * 1 + 30 * 2) / 40
        np.testing.assert_allclose(tensor, 0.9 * start[name] + 0.1 * 1.75, rtol=1e-5, atol=1e-6)
