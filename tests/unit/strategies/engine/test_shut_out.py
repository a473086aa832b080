"""A site that somebody shuts out while it works: nobody waits for it any more."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from worlds.strategies.bench import ready_bench
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import initial_arrays
from worlds.strategies.world import ANY_NUMBER

from strategies import Failure, FatalSiteError, HpcStrategy, Runtime, Settings, run_strategy
from strategies.diloco import DiLoCo
from strategies.fedavg import FedAvg

DAY_S = 86_400.0
OUT_AT_S = 50.0  # b is at work then
WORDS = "it was revoked"
WAITS_FOR_ALL = {
    "flower": lambda: FlowerFedAvg(**ANY_NUMBER),
    "ours": HpcStrategy,
    "fedavg": FedAvg,
    "diloco": DiLoCo,
}


class World:
    """Two sites; `b` is shut out, and off the network, from a time on."""

    def __init__(self, **settings: float) -> None:
        self.grid = FakeGrid([FakeSite("a", step_s=1.0), FakeSite("b", step_s=20.0)])
        self.log: list[tuple[str, dict]] = []
        self.grid.away("b", OUT_AT_S)
        self.runtime = Runtime(
            clock=self.grid.clock,
            emit=lambda event, **fields: self.log.append((event, fields)),
            settings=Settings(offline_grace_s=DAY_S, final_evaluation_s=0.0, **settings),
            revoked=lambda: {"b": WORDS} if self.grid.clock.now() >= OUT_AT_S else {},
        )

    def run(self, strategy):
        return run_strategy(
            strategy, self.grid, initial_arrays(), 3,
            train_config=ConfigRecord({"steps": 10}), runtime=self.runtime,
        )  # fmt: skip

    def told(self, event: str) -> list[dict]:
        return [fields for name, fields in self.log if name == event]


@pytest.mark.parametrize("make", WAITS_FOR_ALL.values(), ids=WAITS_FOR_ALL.keys())
def test_a_round_goes_on_without_a_site_that_is_shut_out(make):
    """Protects a run across centres from a day of silence after `serve revoke`."""
    world = World()
    assert world.run(make()).arrays
    assert world.grid.clock.now() < OUT_AT_S + 100
    assert [(e["facility"], e["reason"]) for e in world.told("site_excluded")] == [("b", WORDS)]
    assert [e["reason"] for e in world.told("order_failed")] == [WORDS]
    assert world.grid.violations == []


def test_a_run_that_needs_the_site_says_so_and_ends():
    """Protects from waiting for what cannot come: the reason is the one to mend."""
    with pytest.raises(FatalSiteError, match=f"b: {WORDS}"):
        World(min_sites=2).run(HpcStrategy())


def test_who_is_invited_again_works_again():
    """Protects a site whose invitation was only replaced: it comes as another node."""
    out = {}
    bench = ready_bench(FakeSite("a", step_s=1.0))
    bench.runtime.revoked = lambda: out
    bench.train(steps=100)
    assert bench.engine.events(timeout=20) == []
    out["a"] = WORDS
    failure = bench.run()
    assert isinstance(failure, Failure)
    assert (failure.fatal, failure.reason) == (True, WORDS)
    assert bench.engine.reachable() == []
    out.clear()
    bench.grid.restart("a")
    assert bench.engine.wait_for(["a"], timeout=10) == ["a"]
    while not bench.engine.reachable():
        bench.engine.discover()
    bench.train(steps=5)
    assert bench.run().steps == 5
    assert bench.names().count("site_excluded") == 1
