"""A site that says what trying again will not fix is left out; the others go on if they can."""

from __future__ import annotations

import pytest
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.world import ANY_NUMBER, ROUNDS, World, each

from flwr_hpc.protocol import Status
from strategies import FatalSiteError, RunFailed, Settings
from strategies.fedasync import FedAsync
from strategies.fedavg import FedAvg

REFUSED = Status("failed", error="Slurm refused the job: invalid account", fatal=True)


def refused(name: str) -> FakeSite:
    return FakeSite(name, fail=REFUSED)


@each
def test_the_others_go_on(make):
    """Protects the jobs of other facilities from one that has a typo in its account."""
    world = World([FakeSite("a"), refused("b"), FakeSite("c", step_s=1.5)])
    world.serve(make)
    assert len(world.events("aggregated")) >= ROUNDS
    assert world.sites[0].trained
    assert world.sites[2].trained
    (left_out,) = world.events("site_excluded")
    assert (left_out["facility"], left_out["reason"]) == ("b", REFUSED.error)
    assert len([e for e in world.events("order_failed") if e["facility"] == "b"]) == 1


def test_refused_in_the_middle_of_a_run():
    """Protects a run whose account at one centre is used up."""
    world = World([FakeSite("a"), FakeSite("b")], rounds=6)
    tell = world.log.append

    class Log(list):
        def append(self, entry):
            tell(entry)
            if entry[0] == "aggregated" and entry[1]["version"] >= 2:
                world.sites[1].fail = REFUSED

    world.log = Log()
    log: list = []
    tell = log.append
    world.serve(FedAvg)
    assert [e for e, f in log if e == "site_excluded"] == ["site_excluded"]
    assert len([e for e, _ in log if e == "aggregated"]) == 6


@pytest.mark.parametrize("make", [FedAvg, FedAsync, lambda: FlowerFedAvg(**ANY_NUMBER)])
def test_nobody_is_left(make):
    """Protects the user from a run that waits for nobody: it ends at once, with every reason."""
    world = World([refused("a"), refused("b")])
    with pytest.raises(FatalSiteError, match=r"(?s)a: Slurm refused.*b: Slurm refused"):
        world.serve(make)
    assert world.grid.clock.now() < 600.0


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: FlowerFedAvg(min_train_nodes=2, min_available_nodes=2), Settings()),
        (lambda: FlowerFedAvg(**ANY_NUMBER), Settings(min_sites=2)),
    ],
)
def test_a_strategy_that_needs_them_all(make, settings):
    """Protects the user from rounds that can never be: who refused, and who is left, is said."""
    world = World([FakeSite("a"), refused("b")], settings)
    with pytest.raises(FatalSiteError, match=r"(?s)b: Slurm refused.*needs 2 sites; left: a"):
        world.serve(make)


def test_failures_of_the_rest_end_the_run_with_every_reason():
    """Protects the reasons: of who was left out, and of who fails again and again."""
    broken = FakeSite("b", fail=Status("failed", error="disk full"))
    world = World([refused("a"), broken], Settings(retries=0, backoff_s=1.0))
    with pytest.raises(RunFailed, match=r"invalid account.*disk full"):
        world.serve(FedAsync)


@pytest.mark.parametrize("anew", [FakeGrid.restart, FakeGrid.come_back], ids=["other", "same"])
def test_a_site_that_was_fixed_takes_part_again(anew):
    """Protects who mends the account and starts the site anew: it comes back as another node, or,
    where it has joined, as the same one."""
    world = World([FakeSite("a", step_s=20.0), refused("b")], rounds=12)

    def mend() -> None:
        world.sites[1].fail = None

    clock, grid = world.grid.clock, world.grid
    sleep = clock.sleep

    def later(seconds: float) -> None:
        sleep(seconds)
        if clock.now() > 500.0 and world.sites[1].fail is not None:
            mend()
            anew(grid, "b")

    clock.sleep = later  # type: ignore[method-assign]
    world.serve(FedAsync)
    assert len(world.events("site_excluded")) == 1
    assert world.sites[1].trained
    assert [e["facility"] for e in world.events("site_online")].count("b") >= 2
