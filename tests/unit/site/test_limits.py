"""A site says no to what its centre does not allow."""

from __future__ import annotations

import pytest
from worlds.site.world import World

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import LimitsConfig
from flwr_hpc.protocol import Order
from flwr_hpc.site.limits import LimitReached, check_order, check_spending

TWO_NODE_HOURS = FacilityConfig(nodes=2, walltime="01:00:00")


def test_an_order_of_more_steps_is_refused() -> None:
    """Protects a centre from orders that hold its nodes for longer than was agreed."""
    limits = LimitsConfig(steps=100)
    check_order(limits, Order("r", "lumi", 0, "train", steps=100))
    check_order(limits, Order("r", "lumi", 0, "evaluate", steps=500))
    with pytest.raises(LimitReached, match=r"101 steps .*site\.limits\.steps=100"):
        check_order(limits, Order("r", "lumi", 0, "train", steps=101))


@pytest.mark.parametrize(
    ("ran_s", "running", "allowed"),
    [
        (0, 0, True),
        (3600, 0, True),
        (3600, 1, False),
        (7200, 0, False),
        (0, 1, True),
        (0, 2, False),
    ],
)
def test_a_job_that_could_exceed_the_budget_is_refused(
    ran_s: float, running: int, allowed: bool
) -> None:
    """Protects a centre's budget: what runs may take its whole walltime."""
    limits = LimitsConfig(node_hours=5)
    if allowed:
        check_spending(limits, TWO_NODE_HOURS, ran_s, running)
    else:
        with pytest.raises(LimitReached, match=r"site\.limits\.node_hours=5"):
            check_spending(limits, TWO_NODE_HOURS, ran_s, running)


def test_without_a_limit_nothing_is_refused() -> None:
    """Protects everybody who sets none."""
    check_spending(LimitsConfig(), TWO_NODE_HOURS, 1e9, 100)


def test_no_job_is_submitted_that_could_exceed_the_budget(world: World) -> None:
    """Protects a centre's budget across jobs and restarts: each may take its whole walltime (1 h),
    and what is spent is read from what lies on disk."""
    world.limits = LimitsConfig(node_hours=1.9)
    site = world.restart()
    assert site.acquire().state == "queued"
    world.up(0)
    assert site.acquire().state == "ready"
    began = world.clock.wall()
    world.job(0, "ended", outcome="completed", started_s=began - 3600, ended_s=began)
    for _ in range(2):
        with pytest.raises(LimitReached, match="node-hours"):
            world.restart().acquire()
    assert len(world.spool.allocations()) == 1
