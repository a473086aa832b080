"""The engine against the traps of Flower, in virtual time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from flwr.app import ConfigRecord
from worlds.strategies.bench import ARRAYS, Bench, ready_bench
from worlds.strategies.grid import FakeSite
from worlds.strategies.toy_model import as_numpy

from flwr_hpc.protocol import ACQUIRE, DESCRIBE, TRAIN, Status
from strategies import (
    Binding,
    Engine,
    Failure,
    Plan,
    RunFailed,
    Settings,
    SiteResult,
)
from strategies.diloco import DiLoCo
from strategies.engine.runtime import Stopped


def test_late_binding():
    """The weights are chosen when the allocation is ready, not when it is asked for."""
    bench = ready_bench(FakeSite("a", queue_s=500))
    asked_at: list[float] = []

    def newest(running: Any) -> Binding:
        asked_at.append(bench.engine.now())
        return Binding(7, ARRAYS)

    bench.engine.request("a", Plan(10, bind=newest))
    arrival = bench.run()
    assert isinstance(arrival, SiteResult)
    assert arrival.order.version == 7
    assert asked_at[0] >= 500
    assert not bench.grid.violations


def test_long_polls_report_progress():
    """A long order is collected in polls of wait_s, each with the progress."""
    bench = ready_bench(FakeSite("a", step_s=30), wait_s=60)
    bench.train(steps=10)
    arrival = bench.run()
    steps = [f["step"] for _, event, f in bench.log if event == "order_progress"]
    assert steps == [2, 4, 6, 8]
    assert bench.sent(TRAIN) == 1
    assert arrival.order.id == "run-a-000000"
    done = next(f for _, event, f in bench.log if event == "order_done")
    assert done["round_trip_s"] == pytest.approx(300, abs=2)


def test_offline_nodes_are_never_polled():
    """Flower destroys the reply of an offline node that is polled for."""
    bench = ready_bench(FakeSite("a", step_s=10))
    bench.train(steps=10)
    bench.grid.away("a", 20, 400)
    arrival = bench.run()
    assert isinstance(arrival, SiteResult)
    assert not bench.grid.violations
    assert bench.names().count("site_offline") == bench.names().count("site_online") - 1 == 1


def test_offline_grace_ends_an_order():
    """A site that stays away fails its order after the grace, and not earlier."""
    bench = ready_bench(FakeSite("a", step_s=10), offline_grace_s=300)
    bench.train(steps=100)
    bench.grid.away("a", 20)
    failure = bench.run()
    assert isinstance(failure, Failure)
    assert "offline" in failure.reason
    assert 319 <= bench.engine.now() <= 325


def test_a_result_is_taken_after_a_night_without_a_line():
    """What a site has trained meanwhile counts, once, if the grace is longer than it was away."""
    site = FakeSite("a", step_s=10)
    bench = ready_bench(site, offline_grace_s=86400)
    bench.train(steps=100)
    bench.grid.away("a", 20, 30000)
    arrival = bench.run()
    assert isinstance(arrival, SiteResult)
    assert bench.engine.now() >= 30000
    assert site.trained == {"run-a-000000": 1}


def test_restart_with_a_new_node_id_reattaches():
    """A restarted SuperNode is a new node; the same order is sent there and trained once."""
    site = FakeSite("a", step_s=10)
    bench = ready_bench(site)
    bench.train(steps=20)
    bench.engine.events(timeout=30)
    bench.grid.restart("a")
    arrival = bench.run()
    assert isinstance(arrival, SiteResult)
    assert site.trained == {"run-a-000000": 1}
    assert bench.sent(TRAIN) == 2


def test_restart_while_the_old_node_is_still_listed():
    """Flower lists a dead node for a minute; the newest node that names the facility counts."""
    site = FakeSite("a", step_s=10)
    bench = ready_bench(site)
    bench.train(steps=20)
    bench.engine.events(timeout=30)
    bench.grid.join(site)
    arrival = bench.run()
    assert isinstance(arrival, SiteResult)
    assert arrival.message.metadata.src_node_id == bench.grid.node_of("a")
    assert site.trained == {"run-a-000000": 1}


def test_a_plain_client_app_is_trained_directly():
    """An ordinary ClientApp knows none of our messages and gets none of our records."""
    bench = Bench(FakeSite("x", plain=True, step_s=50))
    bench.engine.wait_for(1, timeout=100)
    facility = next(iter(bench.engine.sites))
    assert facility.startswith("node-")
    bench.train(facility)
    assert isinstance(bench.run(), SiteResult)
    assert [m.metadata.message_type for m in bench.grid.pushed] == [DESCRIBE, TRAIN]
    assert set(bench.grid.pushed[1].content) == {"arrays", "config"}


def test_a_version_is_evaluated_once_per_site():
    """Training asks for the evaluation only of a version not evaluated there."""
    site = FakeSite("a")
    bench = ready_bench(site)
    for version in (0, 0, 1):
        bench.train(version=version)
        bench.run()
        bench.engine.settle("a")
    assert [o.evaluate for o in site.orders] == [True, False, True]
    assert bench.names().count("evaluated") == 2


@pytest.mark.parametrize(("every", "expected"), [(0, [False] * 3), (2, [True, False, True])])
def test_evaluate_every(every, expected):
    """Evaluation costs node hours; it can be made rarer."""
    site = FakeSite("a")
    bench = ready_bench(site, evaluate_every=every)
    for version in range(3):
        bench.train(version=version)
        bench.run()
        bench.engine.settle("a")
    assert [o.evaluate for o in site.orders] == expected


def test_initialize_takes_the_first_site_that_is_ready():
    """All sites queue at once; one makes the weights, the others keep their allocations."""
    slow, fast = FakeSite("a", queue_s=900), FakeSite("b", queue_s=90)
    bench = ready_bench(slow, fast)
    arrays, files = bench.engine.initialize()
    assert set(arrays) == set(ARRAYS)
    assert files == {"config.json": "{}"}
    assert list(fast.trained) == ["run-b-000000"]
    assert not slow.trained
    assert slow.alloc_number == 1


def test_initialize_goes_to_another_site_when_one_fails():
    """A broken site does not keep the run from starting."""
    bench = ready_bench(
        FakeSite("a", fail=Status("failed", error="no account")), FakeSite("b", queue_s=50)
    )
    arrays, _ = bench.engine.initialize()
    assert arrays


def test_initialize_says_why_nobody_could():
    """The reasons of all sites are in the message."""
    bench = ready_bench(FakeSite("a", fail=Status("failed", error="no account")))
    with pytest.raises(RunFailed, match="no account"):
        bench.engine.initialize()


def test_wait_for_names_who_is_missing():
    """The error says which SuperNode to look at."""
    bench = Bench(FakeSite("a"))
    with pytest.raises(RunFailed, match=r"30 s for b. Online: a"):
        bench.engine.wait_for(["a", "b"], timeout=30)


def test_release_reaches_every_site():
    """No allocation outlives the run."""
    sites = [FakeSite("a"), FakeSite("b", step_s=100)]
    bench = ready_bench(*sites)
    bench.train("a")
    bench.train("b")
    bench.run()
    bench.engine.release()
    assert [s.released for s in sites] == [1, 1]


def test_the_stop_flag():
    """Ctrl-C ends the loop at the next step."""
    bench = ready_bench()
    bench.runtime.stop.set()
    with pytest.raises(Stopped):
        bench.engine.events()


def test_requests_are_guarded():
    """A loop that asks twice, or for nobody, has an error of its own."""
    bench = ready_bench()
    bench.train()
    with pytest.raises(ValueError, match="still works"):
        bench.train()
    with pytest.raises(ValueError, match="Known"):
        bench.train("z")


def test_order_numbers_are_committed_before_they_are_sent():
    """Whatever dies after a push, the number is not used again for another order."""
    bench = ready_bench()
    seen: list[dict[str, Any]] = []
    push = bench.grid._push

    def spy(message: Any) -> str:
        if message.metadata.message_type == TRAIN:
            state = bench.runtime.checkpoints.restore()
            assert state is not None
            seen.append(state["engine"])
        return push(message)

    bench.grid._push = spy  # type: ignore[method-assign]
    bench.train()
    bench.run()
    assert seen[0]["seq"] == {"a": 1}
    assert [(o["facility"], o["seq"]) for o in seen[0]["orders"]] == [("a", 0)]


def test_an_order_in_flight_survives_a_new_engine():
    """A resumed run sends the same order with the same id and base version."""
    site = FakeSite("a", step_s=10)
    bench = ready_bench(site)
    bench.train(steps=20, version=3)
    bench.engine.events(timeout=50)
    again = Engine(bench.grid, bench.runtime)
    again.wait_for(["a"], timeout=1000)
    again.resume(lambda order: Plan(bind=lambda running: Binding(order.version, ARRAYS)))
    arrival = again.events(timeout=1000)[0]
    assert isinstance(arrival, SiteResult)
    assert arrival.order.version == 3
    assert site.trained == {"run-a-000000": 1}


def test_allocation_events_tell_changes_only():
    """The event log shows queued, ready and ended once each."""
    bench = ready_bench(FakeSite("a", queue_s=300))
    bench.train(steps=300)
    bench.run()
    bench.engine.release()
    states = [f["state"] for _, e, f in bench.log if e == "allocation"]
    assert states == ["queued", "ready", "ended"]


def test_rounds_do_without_a_dead_site():
    """One dead client never blocks: the round goes on when its grace is over."""
    bench = ready_bench(FakeSite("a", 1.0), FakeSite("b", 2.0), offline_grace_s=100)
    bench.grid.away("b", 15)
    strategy = DiLoCo()
    strategy.runtime, strategy.engine = bench.runtime, bench.engine
    strategy.start(bench.grid, ARRAYS, 3, train_config=ConfigRecord({"steps": 20}))
    told = [f["facilities"] for _, e, f in bench.log if e == "aggregated"]
    assert told == [["a"], ["a"], ["a"]]


def test_round_deadline_and_quorum():
    """At the deadline a round takes what has arrived, if that is enough."""
    bench = ready_bench(FakeSite("a", 1.0), FakeSite("b", 2.0, queue_s=5000))
    strategy = DiLoCo()
    strategy.runtime, strategy.engine = bench.runtime, bench.engine
    result = strategy.start(
        bench.grid, ARRAYS, 2, timeout=300, train_config=ConfigRecord({"steps": 20})
    )
    told = [f["facilities"] for _, e, f in bench.log if e == "aggregated"]
    assert told == [["a"], ["a"]]
    assert set(as_numpy(result.arrays)) == set(ARRAYS)


def test_all_failing_ends_with_the_reasons():
    """Failed rounds leave the weights alone and end the run after a few."""
    bench = ready_bench(
        FakeSite("a", fail=Status("failed", error="disk full")), retries=0, max_failed_rounds=3
    )
    strategy = DiLoCo()
    strategy.runtime, strategy.engine = bench.runtime, bench.engine
    with pytest.raises(RunFailed, match=r"3 rounds in a row.*disk full"):
        strategy.start(bench.grid, ARRAYS, 10)


def test_settings_are_data():
    """A copy with one value changed is how callers vary them."""
    assert dataclasses.replace(Settings(), wait_s=5.0).wait_s == 5.0


def test_a_warm_allocation_is_not_asked_for_again():
    """A message costs seconds: the next order goes straight to an allocation that just worked."""
    bench = ready_bench()
    for _ in range(3):
        bench.train()
        assert isinstance(bench.run(), SiteResult)
        bench.engine.settle()
    assert bench.sent(TRAIN) == 3
    assert bench.sent(ACQUIRE) == 1


def test_what_goes_with_every_order():
    """Protects the comparison of bases under LoRA: the run's own options reach each order."""
    bench = ready_bench(FakeSite("a", step_s=1))
    bench.engine.runtime.options["base-sha256"] = "a" * 64
    bench.train(steps=2)
    arrival = bench.run()
    assert isinstance(arrival, SiteResult)
    assert arrival.order.options["base-sha256"] == "a" * 64
