"""The traps that other implementations of these algorithms fell into, one test each.

1. an extra 1 / num_clients in the weights of asynchronous updates
2. a server learning rate that is missing
3. the delta taken against the current model instead of the one the site started from
4. a window without arrivals whose timer is never set again (a hang)
5. one dead site that blocks for ever
6. staleness measured from the upload and not from the download
7. queue wait, transfer and compute fused into one "speed"
8. queue time taken as a site's clock minus the server's (skew)
9. admission that looks at the queue delay alone
10. work bounded by the round and not by the job's walltime
11. failures of jobs not modelled
"""

from __future__ import annotations

import pytest
from worlds.strategies.driven import Driven, close, delta, minus, theta

from strategies.async_diloco import AsyncDiLoCo
from strategies.decoupled_diloco import DecoupledDiLoCo
from strategies.fedasync import FedAsync
from strategies.fedavg import FedAvg
from strategies.fedbackfill import FedBackfill
from strategies.fedbuff import FedBuff
from strategies.fedcompass import FedCompass
from strategies.fedqueue import FedQueue

SITES = "abcdefgh"
PLAIN = {"balance": False, "balance_arrivals": False, "momentum": 0.0}
# Weight of one fresh update of eight sites, as the paper has it.
ONE_UPDATE = {
    "fedasync": (lambda: FedAsync(alpha=0.5), 0.5),
    "fedbuff": (lambda: FedBuff(buffer_size=1, outer_lr=0.5), 0.5),
    "async diloco": (lambda: AsyncDiLoCo(delay=1, outer_lr=0.5, momentum=0.0), 0.5),
    "async diloco of all": (lambda: AsyncDiLoCo(outer_lr=0.5, momentum=0.0), 0.5 / 8),
    "fedcompass": (lambda: FedCompass(alpha=0.5), 0.5 / 8),
    "fedbackfill": (lambda: FedBackfill(outer_lr=0.5, **PLAIN), 0.5 / 8),
}
# The server's learning rate halves the step of a round of one.
HALF_STEPS = {
    "fedavg": lambda: FedAvg(outer_lr=0.5),
    "fedbuff": lambda: FedBuff(buffer_size=1, outer_lr=0.5),
    "decoupled": lambda: DecoupledDiLoCo(grace_s=0.0, outer_lr=0.5, momentum=0.0),
    "async diloco": lambda: AsyncDiLoCo(outer_lr=0.5, momentum=0.0),
    "fedbackfill": lambda: FedBackfill(outer_lr=0.5, **PLAIN),
}
WINDOWS = {
    "fedavg": lambda: FedAvg(deadline_s=100.0),
    "fedavg with a grace": lambda: FedAvg(deadline_s=100.0, quorum=1, grace_s=10.0),
    "fedqueue": lambda: FedQueue(round_s=100.0 / 1.15),
}
BARRIERS = {
    **WINDOWS,
    "decoupled": lambda: DecoupledDiLoCo(grace_s=60.0),
    "fedcompass": lambda: FedCompass(min_steps=20, max_steps=50),
}


def cases(table):
    return pytest.mark.parametrize("make", table.values(), ids=table.keys())


@pytest.mark.parametrize(("make", "weight"), ONE_UPDATE.values(), ids=ONE_UPDATE.keys())
def test_1_no_extra_factor_in_asynchronous_weights(make, weight):
    """One update of one of eight sites moves the model by its paper's weight, once."""
    run = Driven(make(), sites=SITES)
    run.ask("a")
    assert run.arrive("a", delta(2.0))
    close(run.now, minus(theta(), (weight, delta(2.0))))


@cases(HALF_STEPS)
def test_2_the_server_learning_rate_counts(make):
    """outer_lr = 0.5 goes half the way."""
    run = Driven(make(), sites="a")
    run.ask("a")
    assert run.arrive("a", delta(2.0)) or run.wake()
    close(run.now, minus(theta(), (0.5, delta(2.0))))


DELTAS = {
    "fedbuff": lambda: FedBuff(buffer_size=1, staleness="constant"),
    "async diloco": lambda: AsyncDiLoCo(delay=1, outer_lr=1.0, momentum=0.0),
    "fedavg": lambda: FedAvg(sites_per_round=1, over_selection=2.0, exponent=0.0),
    "fedcompass": lambda: FedCompass(alpha=1.0, staleness="constant", normalise=True),
    "fedbackfill": lambda: FedBackfill(exponent=0.0, outer_lr=2.0, **PLAIN),
    "fedqueue": lambda: FedQueue(staleness="constant", round_s=10.0),
}


@cases(DELTAS)
def test_3_the_delta_is_against_the_weights_the_site_started_from(make):
    """Two sites start from one version: the second one's update must not undo the first one's."""
    run = Driven(make(), sites="ab")
    run.ask("a"), run.ask("b")
    run.arrive("a", delta(3.0))
    run.at(11.5)  # FedQueue's round ends without b
    assert run.strategy.version == 1
    run.arrive("b", delta(0.0))  # b has not moved: nor may the model
    if run.strategy.version == 1:  # merged with the next window
        run.ask("a"), run.arrive("a", delta(0.0)), run.at(30.0)
    close(run.now, minus(theta(), (1.0, delta(3.0))))


@cases(WINDOWS)
def test_4_a_window_without_arrivals_sets_its_timer_again(make):
    """Three windows pass without anybody; the first arrival after that makes a version."""
    run = Driven(make(), sites="ab")
    run.ask("a"), run.ask("b")
    run.at(350.0)
    assert run.strategy.version == 0
    assert run.strategy.wake_at() == pytest.approx(400.0)
    run.arrive("a", delta(1.0))
    run.at(400.0)
    assert run.strategy.version == 1


@cases(BARRIERS)
def test_5_a_dead_site_blocks_nobody(make):
    """b never answers; a goes through five versions."""
    run = Driven(make(), sites="ab")
    for name in "ab":  # so that the speeds are known
        run.ask(name), run.arrive(name, delta(0.0), tokens=1)
    run.wake()
    run.ask("b")
    before = run.strategy.version
    for _ in range(12):
        if "a" not in run.orders and run.ask("a") is not None:
            run.clock.t += 20.0
            run.arrive("a", delta(0.1), tokens=1)
        run.at(run.clock.now() + 100.0)
    assert run.strategy.version >= before + 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAsync(alpha=1.0),
        lambda: FedBuff(buffer_size=1),
        lambda: AsyncDiLoCo(delay=1, outer_lr=1.0, momentum=0.0, staleness_exponent=0.5),
    ],
)
def test_6_staleness_is_measured_from_the_download(make):
    """Three versions were made while b trained, none while it uploaded: s = (1 + 3)^-0.5."""
    run = Driven(make(), sites="ab")
    run.ask("b")
    for _ in range(3):
        run.ask("a"), run.arrive("a", delta(0.0))
    before = run.now
    run.arrive("b", delta(2.0))
    moved = {k: before[k] - v for k, v in run.now.items()}
    close(moved, {k: 0.5 * d for k, d in delta(2.0).items()})


def test_7_speed_is_compute_alone():
    """A wait of an hour and a slow link leave the seconds per step as they are."""
    run = Driven(FedBackfill())
    run.ask("a")
    run.at(3600.0 + 10 * 2.0 + 30.0)  # preempted: an hour in the queue, 20 s of steps, 30 s else
    run.arrive("a", delta(0.0), step_s=2.0, queued=3600.0)
    pace = run.strategy.pace
    assert (pace.step_s["a"], pace.queue_s["a"], pace.overhead_s["a"]) == (2.0, 3600.0, 30.0)


def test_7_a_wait_ahead_of_the_hand_in_is_no_part_of_the_order():
    """Bound late, an order takes its 50 s however long its allocation has waited."""
    run = Driven(FedBackfill())
    run.at(3600.0)
    run.ask("a")
    run.at(3650.0)
    run.arrive("a", delta(0.0), step_s=2.0, queued=3600.0)
    assert run.strategy.pace.overhead_s["a"] == 30.0


def test_7_a_wait_that_began_before_the_order_is_not_its_cost():
    """Its allocation ended, and the successor had been in the queue for a while."""
    run = Driven(FedBackfill())
    run.ask("a")
    run.at(50.0)
    run.arrive("a", delta(0.0), step_s=2.0)  # 20 s of steps, 30 s else
    run.ask("a")
    run.at(1000.0)
    run.arrive("a", delta(0.0), step_s=2.0, queued=1500.0)
    assert run.strategy.pace.overhead_s["a"] == 30.0


def test_7_waiting_behind_another_order_is_not_its_cost():
    """Handed in ahead it lies at the site for long; were that its cost, orders grew for ever."""
    run = Driven(FedBackfill())
    run.ask("a")
    run.at(50.0)
    run.arrive("a", delta(0.0), step_s=2.0)
    site = run.strategy.sites["a"]
    for _ in range(5):
        run.ask("a", ahead=True)
        run.at(run.clock.now() + 5000.0)
        run.arrive("a", delta(0.0), step_s=2.0)
        assert run.strategy.pace.overhead_s["a"] == 30.0
    assert run.strategy.plan(site).steps == 75


def test_7_the_time_of_a_resumed_order_is_not_its_cost():
    """It is counted from the second hand-in, when most of it was done."""
    run = Driven(FedBackfill())
    run.ask("a")
    run.at(50.0)
    run.arrive("a", delta(0.0), step_s=2.0)
    run.ask("a")
    run.at(55.0)
    run.arrive("a", delta(0.0), step_s=2.0, resumed=True)
    assert run.strategy.pace.overhead_s["a"] == 30.0


def test_8_queue_time_is_the_schedulers_own():
    """The server's clock may stand still or race: the wait is what the site's ledger says."""
    for server_s in (0.0, 1e6):
        run = Driven(FedQueue(round_s=1000.0, q_init=None, timer=1e9), sites="a")
        run.ask("a")
        run.clock.t = server_s
        run.arrive("a", delta(0.0), queued=240.0, step_s=1.0)
        assert run.ask("a").steps == 1000 - 240 - 60


def test_9_a_short_wait_does_not_make_a_late_update_fresh():
    """Slow compute, no queue: it comes a round late and counts as one round stale."""
    run = Driven(FedQueue(round_s=100.0), sites="ab")
    run.ask("a"), run.ask("b")
    run.arrive("a", delta(1.0))
    run.at(115.0)
    before = run.now
    run.ask("a")
    run.arrive("b", delta(4.0), queued=0.0)
    run.fail("a")
    run.wake()
    close(run.now, minus(before, (0.5**0.5, delta(4.0))))


def test_10_work_is_bounded_by_the_walltime():
    """An order of an hour for a job that has ten minutes left is cut to what fits."""
    run = Driven(FedBackfill(round_s=3600.0))
    run.ask("a"), run.arrive("a", delta(0.0), step_s=1.0)
    site = run.strategy.sites["a"]
    site.warm, site.ends_at = True, run.clock.now() + 600.0
    assert run.ask("a").steps <= 600


@cases(BARRIERS)
def test_11_a_job_that_fails_is_waited_for_no_longer(make):
    """b's order is given up: a's update is merged without it, and b may try again."""
    run = Driven(make(), sites="ab")
    for name in "ab":
        run.ask(name), run.arrive(name, delta(0.0), tokens=1)
    run.wake()
    run.ask("a"), run.ask("b")
    before = run.strategy.version
    run.arrive("a", delta(1.0), tokens=1)
    run.fail("b")
    run.at(run.clock.now())
    assert run.strategy.version == before + 1
    assert run.ask("b") is not None


def test_11_partial_work_counts_for_what_it_is():
    """A job that ended after 30 of 100 steps: its tokens and steps weigh, not those asked for."""
    run = Driven(DecoupledDiLoCo(grace_s=0.0, quorum=2), sites="ab")
    run.ask("a"), run.ask("b")
    run.arrive("a", delta(1.0), steps=30, tokens=300)
    update = next(iter(run.strategy.buffer))
    assert (update.steps, run.strategy.weight(update)) == (30, 300**2 / 30)
