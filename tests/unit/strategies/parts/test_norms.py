"""Bounds on the norm of a site's update: refused, by what it did before, or scaled to a norm."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from worlds.strategies.grid import FakeSite
from worlds.strategies.toy_model import array, as_numpy, initial_arrays
from worlds.strategies.world import ANY_NUMBER, World, ends_well

from flwr_hpc.protocol import ARRAYS
from strategies.diloco import DiLoCo
from strategies.engine.runtime import Settings
from strategies.fedavg import FedAvg
from strategies.fedbuff import FedBuff
from strategies.parts.norms import ENOUGH, WINDOW, UpdateNorms, scaled_update, update_norm


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
    limit = UpdateNorms(10.0, None, None, {})
    base = record(0.0)

    def fault(site, value):
        return limit.judge(site, base, record(value)).fault

    for _ in range(ENOUGH):
        assert not fault("a", 1.0)
    assert not fault("b", 1000.0)
    for _ in range(WINDOW):
        assert "above 10 times the median 2" in fault("a", 11.0)
    assert not fault("a", 9.0)
    for _ in range(2 * WINDOW):
        assert not fault("a", 9.0)
    assert len(limit.norms["a"]) == WINDOW
    assert not fault("a", 80.0)


def test_without_a_limit_nothing_is_read():
    """It costs a pass over both models."""
    assert not UpdateNorms(None, None, None, {}).judge("a", None, None).fault


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


def test_clipping_keeps_direction_and_dtype():
    """A tensor is scaled when it is read; what is no longer than the bound is left as it is."""
    norms = UpdateNorms(None, 3.0, None, {})
    base, trained = record(1.0, 2.0), record(4.0, 2.0)  # 6 apart
    scale = norms.judge("a", base, trained).scale
    clipped = scaled_update(base, trained, scale)
    assert scale == pytest.approx(0.5)
    assert update_norm(base, clipped) == pytest.approx(3.0)
    np.testing.assert_allclose(clipped["w0"].numpy(), 2.5)
    assert clipped["w0"].numpy().dtype == np.float32
    assert scaled_update(base, trained, 1.0) is trained
    assert norms.judge("a", base, base).scale == 1.0


def test_the_bound_follows_a_quantile_of_all_sites():
    """Norms before clipping count, so that it does not shrink by itself; it begins late."""
    norms, base = UpdateNorms(None, None, 0.5, {}), record(0.0)
    given = [1.0, 3.0, 2.0, 5.0, 4.0]
    scales = [norms.judge("ab"[i % 2], base, record(x)).scale for i, x in enumerate(given)]
    assert scales == [1.0] * ENOUGH
    assert norms.bound() == pytest.approx(6.0)  # of four numbers: the norm is twice the value
    assert norms.judge("c", base, record(12.0)).scale == pytest.approx(0.25)
    assert norms.norms["c"] == [pytest.approx(24.0)]


CLIPPED = {
    "fedavg": lambda: FedAvg(weighted_by="uniform"),
    "flower's fedavg": lambda: FlowersFedAvg(**ANY_NUMBER),
    "diloco": lambda: DiLoCo(outer_lr=1.0, momentum=0.0),
    "fedbuff": lambda: FedBuff(buffer_size=2),
}


@pytest.mark.parametrize("make", CLIPPED.values(), ids=CLIPPED.keys())
def test_every_strategy_gets_clipped_updates(make):
    """No version moves farther than the bound, for ours, asynchronous ones and Flower's."""
    moved = {}
    for bound in (None, 0.25):
        sites = [FakeSite("a", 1.0), FakeSite("b", 50.0)]
        world = World(sites, Settings(clip_update_norm=bound), rounds=1)
        arrays = ends_well(world, make)
        found = ArrayRecord({name: array(x) for name, x in arrays.items()})
        moved[bound] = update_norm(initial_arrays(), found)
        scales = [e["metrics"].get("update_scale", 1.0) for e in world.arrived("b")]
        assert (min(scales) < 0.05) == (bound is not None)
    assert moved[None] > 10.0
    assert moved[0.25] <= 0.25 * (1 + 1e-5)
