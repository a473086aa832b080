"""What every strategy must stand when its server dies: the same bits, and nothing trained twice."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.serverapp.strategy import Strategy
from worlds.strategies.toy_model import as_numpy
from worlds.strategies.world import (
    LATE,
    ROUNDS,
    Killed,
    World,
    apart,
    each,
    each_exact,
    each_late,
    finite,
    sites,
)

from strategies.fedavg import FedAvg
from strategies.fedbackfill import FedBackfill
from strategies.fedbuff import FedBuff


def killed_everywhere(make, sites_of, rounds=ROUNDS, every=1):
    """Compare every resumed run with the one that was never killed, bit by bit."""
    whole = World(sites_of(), rounds=rounds)
    expected = as_numpy(whole.serve(make).arrays)
    trained = [set(site.trained) for site in whole.sites]
    for k in range(0, whole.moments, every):
        world = World(sites_of(), rounds=rounds)
        with pytest.raises(Killed):
            world.serve(make, die_at=k)
        result = as_numpy(world.serve(make).arrays)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(result[name], tensor, err_msg=f"killed at moment {k}")
        assert [set(site.trained) for site in world.sites] == trained, f"killed at moment {k}"
        assert world.grid.violations == []


@each_exact
def test_kill_at_every_moment_and_resume(make):
    """Wherever the server dies, the resumed run ends with the same bits and trains no more."""
    killed_everywhere(make, apart if make in LATE.values() else sites)


@each_late
def test_kill_at_every_moment_about_a_deadline(make):
    """A death shifts a deadline, and who is late with it: all versions come, none counts twice."""
    whole = World(sites())
    whole.serve(make)
    for k in range(whole.moments):
        world = World(sites())
        with pytest.raises(Killed):
            world.serve(make, die_at=k)
        result = world.serve(make)
        finite(result)
        assert set(result.train_metrics_clientapp) == {1, 2, 3}
        assert all(n == 1 for site in world.sites for n in site.trained.values())
        assert world.grid.violations == []


DEEP = {
    "fedbackfill": lambda: FedBackfill(round_s=20.0, min_steps=5),
    "fedbackfill bound early": lambda: FedBackfill(round_s=20.0, late_binding=False),
    "fedbuff debiased": lambda: FedBuff(buffer_size=3, debias=True),
    "fedprox": lambda: FedAvg(proximal_mu=0.1),
}


@pytest.mark.parametrize("make", DEEP.values(), ids=DEEP.keys())
def test_kill_in_a_longer_run(make):
    """What is known of the sites, momenta and averages go on as they were."""
    killed_everywhere(make, sites, rounds=8, every=5)


def test_orders_handed_in_ahead():
    """Overlap: an order waits at the site while one is trained; deaths lose and double nothing."""

    def make() -> Strategy:
        return FedBackfill(round_s=20.0, min_steps=5, overlap=True)

    whole = World(sites())
    expected = as_numpy(whole.serve(make).arrays)
    under_way, most = set(), 0
    for event, fields in whole.log:
        if event == "order_sent" and fields["kind"] == "train":
            under_way.add((fields["facility"], fields["order_id"]))
        elif event == "order_done":
            under_way.discard((fields["facility"], fields["order_id"]))
        most = max(most, *(sum(f == name for f, _ in under_way) for name in "abc"))
    assert most == 2
    assert whole.grid.violations == []
    for k in range(whole.moments):
        world = World(sites())
        with pytest.raises(Killed):
            world.serve(make, die_at=k)
        result = as_numpy(world.serve(make).arrays)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(result[name], tensor, err_msg=f"killed at moment {k}")
        assert all(n == 1 for site in world.sites for n in site.trained.values())


@each_exact
def test_many_deaths(make):
    """A server that dies again and again still gets there."""
    whole = World(sites())
    expected = as_numpy(whole.serve(make).arrays)
    world = World(sites())
    result = None
    for _ in range(100):
        try:
            result = world.serve(make, die_at=35)
        except Killed:
            continue
        break
    assert result is not None
    for name, tensor in expected.items():
        np.testing.assert_array_equal(as_numpy(result.arrays)[name], tensor)


@each
def test_the_data_of_a_finished_run_restarts_nothing(make):
    """Resuming a run that is done trains nothing."""
    world = World(sites())
    expected = as_numpy(world.serve(make).arrays)
    before = [dict(site.trained) for site in world.sites]
    again = as_numpy(world.serve(make).arrays)
    assert [dict(site.trained) for site in world.sites] == before
    for name, tensor in expected.items():
        np.testing.assert_array_equal(again[name], tensor)
