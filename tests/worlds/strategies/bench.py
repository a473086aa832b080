"""An engine over a fake grid, in virtual time."""

from __future__ import annotations

from typing import Any

from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import initial_arrays

from strategies import Binding, Engine, Failure, Plan, Runtime, Settings, SiteResult

ARRAYS = initial_arrays()


class Bench:
    """An engine over a fake grid, and its events."""

    def __init__(self, *sites: FakeSite, **settings: Any) -> None:
        self.grid = FakeGrid(sites)
        self.log: list[tuple[float, str, dict[str, Any]]] = []
        self.runtime = Runtime(
            clock=self.grid.clock,
            emit=lambda event, **f: self.log.append((self.grid.clock.now(), event, f)),
            settings=Settings(**settings),
            restarted=self.grid.restarted,
        )
        self.engine = Engine(self.grid, self.runtime)

    def train(self, facility: str = "a", steps: int = 10, version: int = 0) -> None:
        plan = Plan(steps, bind=lambda running: Binding(version, ARRAYS))
        self.engine.request(facility, plan)

    def run(self, seconds: float = 1e5) -> SiteResult | Failure:
        """Return the first thing the engine reports."""
        found = self.engine.events(timeout=seconds)
        assert found, f"nothing within {seconds} s: {self.log}"
        return found[0]

    def names(self) -> list[str]:
        return [event for _, event, _ in self.log]

    def sent(self, kind: str) -> int:
        return sum(m.metadata.message_type == kind for m in self.grid.pushed)


def ready_bench(*sites: FakeSite, **settings: Any) -> Bench:
    bench = Bench(*(sites or (FakeSite("a"),)), **settings)
    bench.engine.wait_for([s.name for s in sites] or ["a"], timeout=100)
    return bench
