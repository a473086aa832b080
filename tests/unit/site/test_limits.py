"""A site says no to what its centre does not allow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from worlds.site.world import World
from worlds.strategies.grid import name_this_process

from flwr_hpc import protocol
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import LimitsConfig
from flwr_hpc.protocol import Order
from flwr_hpc.site import client_app
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


def test_who_refuses_tells_its_own_people_and_lets_its_job_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a centre from a job that idles for a run that goes on without it, and from silence
    at the site: the server alone was told."""
    name_this_process()
    world.site.acquire()
    world.up(0)
    settings = SimpleNamespace(name="a", limits=LimitsConfig(steps=99))
    launcher = SimpleNamespace(settings=settings, site=world.site)
    monkeypatch.setattr(client_app, "from_node_config", lambda _: settings)
    monkeypatch.setattr(client_app, "make_launcher", lambda _: launcher)
    monkeypatch.setattr(client_app.signal, "signal", lambda *_: None)
    context = SimpleNamespace(node_config={})
    order = Order("r", "a", 0, "train", steps=100)
    content = RecordDict({protocol.ORDER: ConfigRecord({"json": protocol.to_json(order)})})
    assert world.spool.left_out.read() is None
    reply = client_app._order(Message(content, 1, "train"), context, "train")
    status = protocol.read_status(str(reply.content[protocol.STATUS]["json"]))
    assert (status.fatal, status.order_id) == (True, order.id)
    left_out = world.spool.left_out.read()
    assert left_out is not None
    assert left_out.reason == status.error
    assert "site.limits.steps=99" in status.error
    assert world.alloc(0).released
