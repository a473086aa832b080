"""A bound on the norm of a site's update, by what that site did before."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from worlds.strategies.grid import FakeSite
from worlds.strategies.toy_model import array, as_numpy
from worlds.strategies.world import World, ends_well

from flwr_hpc.protocol import ARRAYS
from strategies.engine.runtime import Settings
from strategies.fedavg import FedAvg
from strategies.parts.norms import ENOUGH, WINDOW, NormLimit, update_norm


def record(*values):
    return ArrayRecord({f"w{i}": Array(np.full(4, v, np.float32)) for i, v in enumerate(values)})


def test_the_norm_is_of_the_difference_and_of_what_was_returned():
    """Large values do not overflow, and a part is measured as a part."""
    assert update_norm(record(1.0, 2.0), record(1.0, 5.0)) == pytest.approx(6.0)
    part = ArrayRecord({"w1": Array(np.full(4, 3.0, np.float32))})
    assert update_norm(record(1.0, 2.0), part) == pytest.approx(2.0)
    assert update_norm(record(0.0), record(1e25)) == pytest.approx(2e25)


def test_a_site_is_held_to_its_own_updates():
    """Not to another's, not before there are enough, and not to those that were refused."""
    limit = NormLimit(10.0, {})
    base = record(0.0)
    for _ in range(ENOUGH):
        assert limit.fault("a", base, record(1.0)) is None
    assert limit.fault("b", base, record(1000.0)) is None
    for _ in range(WINDOW):
        assert "above 10 times the median 2" in limit.fault("a", base, record(11.0))
    assert limit.fault("a", base, record(9.0)) is None
    for _ in range(2 * WINDOW):
        assert limit.fault("a", base, record(9.0)) is None
    assert len(limit.norms["a"]) == WINDOW
    assert limit.fault("a", base, record(80.0)) is None


def test_without_a_limit_nothing_is_read():
    """It costs a pass over both models."""
    assert NormLimit(None, {}).fault("a", None, None) is None


def far_away(content):
    arrays = as_numpy(content[ARRAYS])
    content[ARRAYS] = ArrayRecord({k: array(x + np.float32(1e6)) for k, x in arrays.items()})


def test_an_update_that_is_far_too_large_is_refused_also_after_a_resume():
    """A site that was good for long sends poison; what is usual for it survives a restart."""
    sites = [FakeSite("a", 1.0), FakeSite("b", -1.0)]
    world = World(sites, Settings(update_norm_limit=50.0, retries=0), rounds=ENOUGH + 1)
    ends_well(world, lambda: FedAvg(deadline_s=100.0))
    sites[1].spoil = far_away
    world.rounds += 2
    arrays = ends_well(world, lambda: FedAvg(deadline_s=100.0))
    assert any("median" in e["reason"] for e in world.events("order_rejected"))
    assert max(float(np.abs(x).max()) for x in arrays.values()) < 100.0
