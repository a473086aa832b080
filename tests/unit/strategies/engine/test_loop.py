"""What the event loop decides once, for every strategy."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAdam as FlowerFedAdam
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from worlds.strategies.driven import Driven
from worlds.strategies.grid import FakeGrid, FakeSite, VirtualClock
from worlds.strategies.toy_model import as_numpy, initial_arrays, with_nan
from worlds.strategies.world import ANY_NUMBER, Killed, World, run_scripted

from flwr_hpc.protocol import DESCRIBE, Status
from strategies import (
    Engine,
    HpcStrategy,
    RunFailed,
    Runtime,
    Settings,
    run_strategy,
)
from strategies.async_diloco import AsyncDiLoCo
from strategies.engine.troubles import Troubles
from strategies.fedavg import FedAvg
from strategies.fedbackfill import FedBackfill
from strategies.fedbuff import FedBuff
from strategies.fedcompass import FedCompass

# ---- runs that come to nothing ------------------------------------------------------------------


@pytest.mark.parametrize("make", [HpcStrategy, FedAvg, lambda: FlowerFedAvg(**ANY_NUMBER), FedBuff])
def test_a_run_without_a_version_has_failed(make):
    """Nothing but NaN: the initial weights are not a result."""
    spoilt = [FakeSite(name, spoil=with_nan) for name in "ab"]
    with pytest.raises(RunFailed, match=r"a: .*not finite.*b: .*not finite"):
        run_scripted(make(), *spoilt)


@pytest.mark.parametrize("make", [HpcStrategy, FedBackfill, FedCompass, FedAvg])
def test_nobody_is_left(make):
    """All sites die: the run ends after the grace and says when each was lost."""
    grid = FakeGrid([FakeSite("a"), FakeSite("b", fail=Status("failed", error="no quota"))])
    grid.clock.limit = 100_000.0
    grid.away("a", 20.0)
    grid.away("b", 40.0)
    settings = Settings(offline_grace_s=100.0)
    with pytest.raises(RunFailed, match=r"a: .*offline.*b: .*no quota.*offline"):
        run_strategy(
            make(), grid, initial_arrays(), 10**6,
            train_config=ConfigRecord({"steps": 10**5}),
            runtime=Runtime(clock=grid.clock, settings=settings),
        )  # fmt: skip
    assert 130.0 < grid.clock.now() < 200.0


def test_the_living_fail():
    """One site is dead, the other fails: that is as good as both failing."""
    grid = FakeGrid([FakeSite("a"), FakeSite("b", fail=Status("failed", error="no quota"))])
    grid.clock.limit = 100_000.0
    grid.away("a", 20.0)
    with pytest.raises(RunFailed, match=r"a: .*offline.*b: no quota"):
        run_strategy(
            FedBuff(), grid, initial_arrays(), 100, train_config=ConfigRecord({"steps": 10**5}),
            runtime=Runtime(clock=grid.clock, settings=Settings(offline_grace_s=100.0)),
        )  # fmt: skip


def test_sites_that_train_nothing_for_ever():
    """Orders without a single step are no progress either."""
    with pytest.raises(RunFailed, match="a: it trained no step"):
        run_scripted(FedBuff(), FakeSite("a", most_steps=0))


# ---- what weighs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("partial", "facilities"), [(True, ["a", "b"]), (False, ["a"])])
def test_partial_work_is_a_switch(partial, facilities):
    """Off, a result of 3 of 5 steps does not count."""
    log: list = []
    sites = FakeSite("a"), FakeSite("b", most_steps=3)
    run_scripted(FedAvg(), *sites, log=log, partial_work=partial)
    assert [f["facilities"] for e, f in log if e == "aggregated"] == [facilities]


def test_back_off_is_a_switch():
    """Without it a failing site is asked again at once; with it, ever more rarely."""
    failures = []
    for backoff_s in (0.0, 60.0):
        log: list = []
        sites = FakeSite("a", step_s=20.0), FakeSite("b", fail=Status("failed", error="no"))
        run_scripted(FedBuff(), *sites, rounds=1, log=log, backoff_s=backoff_s, retries=0)
        failures.append(sum(event == "order_failed" for event, _ in log))
    assert failures[0] > 3 * failures[1] > 0


def test_failures_are_counted_over_a_resume():
    """A server that dies often must not ask a broken site for ever, nor at once."""
    clock = VirtualClock()
    clock.t = 1000.0
    engine = Engine(FakeGrid([FakeSite("a")], clock), Runtime(clock=clock))
    before, after = Troubles(engine), Troubles(engine)
    before.failed("a", "no quota")
    before.failed("a", "no node")
    after.load(json.loads(json.dumps(before.save())))
    assert after.rests("a")
    clock.t = 1061.0  # twice the first pause
    assert not after.rests("a")
    assert after.failed("a", "no quota") == 120.0
    assert "a: no quota" in after.reasons()


def test_failed_rounds_are_counted_over_a_resume():
    """A server that dies often must not begin rounds that cannot succeed for ever."""

    def world():
        settings = Settings(min_sites=2, retries=0, max_failed_rounds=3)
        broken = FakeSite("b", fail=Status("failed", error="disk full"))
        return World([FakeSite("a"), broken], settings, rounds=9)

    whole = world()
    with pytest.raises(RunFailed, match="3 rounds in a row"):
        whole.serve(FlowerFedAvg)
    for k in range(0, whole.moments, 3):
        resumed = world()
        with pytest.raises(Killed):
            resumed.serve(FlowerFedAvg, die_at=k)
        with pytest.raises(RunFailed, match="3 rounds in a row"):
            resumed.serve(FlowerFedAvg)
        assert set(resumed.sites[0].trained) == set(whole.sites[0].trained)


# ---- how many there are -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [FedBackfill, AsyncDiLoCo, lambda: FedCompass(min_steps=5, max_steps=10)]
)
def test_sites_that_are_gone_do_not_shorten_the_step(make):
    """Three of four are gone: N is 1, and not 4 for ever."""
    grid = FakeGrid([FakeSite(name, step_s=2.0) for name in "abcd"])
    for name in "bcd":
        grid.away(name, 30.0)
    seen = {}
    strategy = make()

    def look(version, arrays):
        seen[version] = strategy.num_sites

    run_strategy(
        strategy, grid, initial_arrays(), 60, train_config=ConfigRecord({"steps": 10}),
        evaluate_fn=look, runtime=Runtime(clock=grid.clock, settings=Settings(offline_grace_s=60)),
    )  # fmt: skip
    assert max(seen.values()) == 4
    assert seen[60] == 1


def test_a_restarted_plain_supernode_is_not_one_more_site():
    """It comes back under another name; the old one is gone, and does not count."""
    grid = FakeGrid([FakeSite("x", plain=True, step_s=2.0), FakeSite("y", plain=True, step_s=2.0)])
    grid.restart("x", at=30.0)
    strategy = FedBackfill(round_s=20.0)
    settings = Settings(offline_grace_s=60.0)
    run_strategy(
        strategy, grid, initial_arrays(), 150, train_config=ConfigRecord({"steps": 10}),
        runtime=Runtime(clock=grid.clock, settings=settings),
    )  # fmt: skip
    assert len(strategy.sites) == 3
    assert strategy.num_sites == 2


# ---- who takes part -----------------------------------------------------------------------------


def drawn(rounds=40, run_key="k", **arguments):
    """Return who was in each version of a run with two of six."""
    log: list = []
    grid = FakeGrid([FakeSite(name) for name in "abcdef"])
    runtime = Runtime(
        clock=grid.clock, run_key=run_key, emit=lambda event, **f: log.append((event, f))
    )
    strategy = FedAvg(sites_per_round=2, **arguments)
    config = ConfigRecord({"steps": 5})
    run_strategy(strategy, grid, initial_arrays(), rounds, train_config=config, runtime=runtime)
    return [f["facilities"] for event, f in log if event == "aggregated"]


def test_who_takes_part_is_drawn():
    """All sites get their turn, not the alphabetically first ones; a run key fixes the draw."""
    rounds = drawn()
    assert all(len(who) == 2 for who in rounds)
    counts = {name: sum(name in who for who in rounds) for name in "abcdef"}
    assert min(counts.values()) >= 5
    assert drawn() == rounds != drawn(run_key="another")


def test_a_drawn_site_that_fails_is_replaced():
    """Somebody else is drawn into the window."""
    run = Driven(FedAvg(sites_per_round=1), sites="abc")
    asked = next(name for name in "abc" if run.ask(name) is not None)
    assert [name for name in "abc" if name != asked and run.ask(name) is not None] == []
    run.fail(asked)
    others = [name for name in "abc" if run.ask(name) is not None]
    assert len(others) == 1
    assert others != [asked]


# ---- wrappers -----------------------------------------------------------------------------------


def private():
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

    inner = FlowerFedAdam(min_train_nodes=2, min_evaluate_nodes=1, min_available_nodes=3)
    return DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 10.0, 3)


def test_a_wrapped_strategy_is_saved_with_its_wrapper():
    """FedAdam's moments within a strategy for differential privacy survive a kill."""
    whole, world = (World([FakeSite(n, float(k)) for k, n in enumerate("abc")]) for _ in "12")
    expected = as_numpy(whole.serve(private).arrays)
    with pytest.raises(Killed):
        world.serve(private, die_at=2 * whole.moments // 3)
    result = as_numpy(world.serve(private).arrays)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(result[name], tensor)


def test_a_wrapped_strategy_says_how_many_sites_it_needs():
    """Else Flower's sampling would wait for the third for ever."""
    sites = [FakeSite("a"), FakeSite("b")]
    with pytest.raises(RunFailed, match="needed 3"):
        run_scripted(private(), *sites, rounds=3, offline_grace_s=20.0)


# ---- idle sites ---------------------------------------------------------------------------------


class Walltimed(FakeSite):
    """Tells how much walltime is left, as a real launcher does."""

    def _status(self, status):
        return super()._status(
            Status(
                **{
                    **vars(status),
                    "walltime_left_s": 5000.0 if self.alloc_ready is not None else None,
                }
            )
        )


def test_an_idle_warm_site_is_looked_at():
    """A site that waits for the others sees to its next allocation meanwhile."""
    grid = FakeGrid([Walltimed("fast", step_s=0.1), FakeSite("slow", step_s=200.0)])
    asked: list[float] = []
    push = grid._push

    def spy(message):
        if message.metadata.message_type == DESCRIBE:
            asked.append(grid.clock.now())
        return push(message)

    grid._push = spy
    config = ConfigRecord({"steps": 10})
    run_strategy(
        FedAvg(), grid, initial_arrays(), 1, train_config=config, runtime=Runtime(clock=grid.clock)
    )
    looks = [t for t in asked if t > 10.0]
    assert 5 <= len(looks) <= 8
    assert min(b - a for a, b in itertools.pairwise(looks)) >= 200.0  # 5 % of what is left
    assert not grid.violations
