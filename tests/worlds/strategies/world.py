"""Every strategy, and the world of scripted sites that the contract tests put it into.

Every file of `conf/strategy` is a row. One whose times or sizes do not suit runs of three rounds
has its own in `ARGUMENTS`; further settings of a strategy are rows of `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvgM, FedYogi, Result, Strategy
from hydra.utils import instantiate
from omegaconf import OmegaConf
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import as_numpy, initial_arrays

from strategies import (
    AsyncStrategy,
    Engine,
    HpcStrategy,
    Runtime,
    Settings,
    SiteResult,
    run_strategy,
)
from strategies.engine.runtime import MemoryCheckpoints
from strategies.fedasync import FedAsync
from strategies.fedavg import FedAvg as OurFedAvg
from strategies.fedbackfill_rounds import FedBackfillRounds
from strategies.streaming_diloco import StreamingDiLoCo

ANY_NUMBER = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
ROUNDS = 3
HANGS_S = 100_000.0  # of virtual time: no run here takes so long, unless it waits for ever


class Mixing(AsyncStrategy):
    """A user's asynchronous strategy: every arrival is mixed in."""

    def on_result(self, arrival: SiteResult, staleness: int) -> Any:
        assert arrival.arrays is not None
        alpha = np.float32(0.5 / (1 + staleness))
        for name, array in self.arrays.items():
            here = array.numpy()
            yield name, here + alpha * (arrival.arrays[name].numpy() - here)


CONF = Path(__file__).parents[3] / "conf" / "strategy"
SHORT = {"round_s": 20.0, "min_steps": 5}
ARGUMENTS: dict[str, dict[str, Any]] = {  # by file of `conf/strategy`, in place of those there
    "fedavg_deadline": {"deadline_s": None},
    "fedasync": {"alpha": 0.6, "staleness": "hinge", "a": 1.0, "b": 1.0},
    "fedbuff": {"buffer_size": 3},
    "decoupled_diloco": {"quorum": 2, "grace_s": 0.0},
    "fedcompass": {"min_steps": 5, "max_steps": 10},
    "fedqueue": {"round_s": 200.0, "min_steps": 5},
    "private": {"noise_multiplier": 0.0, "min_updates": 1},  # noise is never the same
    "fedbackfill": SHORT,
    "fedbackfill_rounds": {**SHORT, "grace": 0.0},
}


def configured(name: str, **arguments: Any) -> Callable[[], Strategy]:
    """Return what makes a strategy of `conf/strategy`."""
    spec = OmegaConf.load(CONF / f"{name}.yaml")
    return partial(instantiate, OmegaConf.merge(spec, ARGUMENTS.get(name, {}), arguments))


# A deadline is kept as what is left of it at the last commit: a death shifts it.
LATE: dict[str, Callable[[], Strategy]] = {
    "merge": lambda: OurFedAvg(deadline_s=60.0, late="merge"),
    "drop": lambda: OurFedAvg(deadline_s=60.0, late="drop"),
    "grace": lambda: FedBackfillRounds(round_s=20.0, min_steps=5),
    "meeting": configured("fedcompass"),
}
VARIANTS: dict[str, Callable[[], Strategy]] = {
    "mixing": Mixing,
    "fedavg with a quorum": lambda: OurFedAvg(quorum=2, grace_s=0.0),
    "fedavg of two of three": lambda: OurFedAvg(sites_per_round=2, over_selection=1.5),
    "fedavg that merges what is late": LATE["merge"],
    "fedavg that drops what is late": LATE["drop"],
    "fedbackfill rounds with a grace": LATE["grace"],
    "fedasync, averaged and sized": lambda: FedAsync(average=4.0, size_steps=True, **SHORT),
    "fedavg, averaged and sized": lambda: OurFedAvg(
        quorum=2, grace_s=0.0, average=4.0, size_steps=True, **SHORT
    ),
    "streaming diloco without overlap": lambda: StreamingDiLoCo(overlap=False),
    "flower fedavgm": lambda: FedAvgM(**ANY_NUMBER, server_momentum=0.9),
    "flower fedyogi": lambda: FedYogi(**ANY_NUMBER),
}
STRATEGIES = {p.stem: configured(p.stem) for p in sorted(CONF.glob("*.yaml"))} | VARIANTS
# FedCompass's sites do as much as fits until they meet: those of equal orders do the same after a
# death.
EXACT = STRATEGIES | {"fedcompass": configured("fedcompass", min_steps=10, max_steps=10)}

each_exact = pytest.mark.parametrize("make", EXACT.values(), ids=EXACT.keys())
each = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES.keys())
each_late = pytest.mark.parametrize("make", LATE.values(), ids=LATE.keys())


def run(
    strategy: Strategy,
    grid: FakeGrid,
    runtime: Runtime,
    arrays: ArrayRecord,
    engine: Engine,
    rounds: int,
) -> Result:
    """Start a strategy the way the server application does."""
    config = ConfigRecord({"steps": 10})
    if isinstance(strategy, HpcStrategy):
        strategy.runtime, strategy.engine = runtime, engine
        return strategy.start(grid, arrays, rounds, train_config=config)
    return run_strategy(
        strategy, grid, arrays, rounds, train_config=config, runtime=runtime, engine=engine
    )


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


class MortalCheckpoints(MemoryCheckpoints):
    """Tells before and after everything it does."""

    moment: Callable[[], None] = staticmethod(lambda: None)
    most = 0  # bytes that it has had at once

    def put(self, name: str, tensors: Any) -> ArrayRecord:
        record = super().put(name, tensors)
        self.most = max(self.most, sum(map(_size, self._records.values())))
        self.moment()
        return record

    def commit(self, state: dict[str, Any]) -> None:
        self.moment()
        super().commit(state)
        self.moment()


def _size(record: ArrayRecord) -> int:
    return sum(array.numpy().nbytes for array in record.values())


@dataclass
class World:
    """Sites, clock and checkpoints outlive a server process."""

    sites: list[FakeSite]
    settings: Settings = field(default_factory=Settings)
    rounds: int = ROUNDS
    checkpoints: MortalCheckpoints = field(default_factory=MortalCheckpoints)
    moments: int = 0  # at which the last server process could have died
    log: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grid = FakeGrid(self.sites)
        self.grid.clock.limit = HANGS_S

    def serve(self, make: Callable[[], Strategy], *, die_at: int | None = None) -> Result:
        """Run one server process; it dies at its `die_at`-th event, put or commit."""
        self.moments = 0
        self.grid.new_run()

        def moment() -> None:
            if self.moments == die_at:
                raise Killed
            self.moments += 1

        def emit(event: str, **fields: Any) -> None:
            self.log.append((event, fields | {"at": self.grid.clock.now()}))
            moment()

        self.checkpoints.moment = moment
        runtime = Runtime(self.grid.clock, emit, self.checkpoints, "k", self.settings)
        runtime.restarted = self.grid.restarted
        engine = Engine(self.grid, runtime)
        engine.wait_for([s.name for s in self.sites if not s.plain], timeout=1000)
        arrays = ArrayRecord()
        if engine.restored is None:
            launchers = any(site.launcher for site in engine.sites.values())
            arrays = engine.initialize()[0] if launchers else initial_arrays()
        result = run(make(), self.grid, runtime, arrays, engine, self.rounds)
        engine.release()
        return result

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return what was told under a name, with the time `at` which it was."""
        return [fields for event, fields in self.log if event == name]

    def arrived(self, facility: str) -> list[dict[str, Any]]:
        """Return what was told of a facility's finished training."""
        mine = [e for e in self.events("order_done") if e["facility"] == facility]
        return [e for e in mine if e["kind"] == "train"]

    def merged(self, facility: str) -> list[dict[str, Any]]:
        """Return what was told of the versions a facility had a part in."""
        return [e for e in self.events("aggregated") if facility in e["facilities"]]


def sites() -> list[FakeSite]:
    """Return three of different speed, queue and start-up."""
    return [
        FakeSite("a", 1.0, queue_s=70.3, step_s=1.1, examples=10),
        FakeSite("b", -1.0, queue_s=3.1, step_s=9.7, examples=20),
        FakeSite("c", 3.0, load_s=11.4, step_s=2.3, examples=30),
    ]


def apart() -> list[FakeSite]:
    """Return sites of which one is later than any deadline, however a death shifts it."""
    return [
        FakeSite("a", 1.0, step_s=1.1),
        FakeSite("b", -1.0, step_s=1.7),
        FakeSite("late", 3.0, step_s=30.0),
    ]


def long(make: Callable[[], Strategy]) -> int:
    """Return for how many versions a run lasts about as long as three synchronous rounds."""
    return 12 * ROUNDS if isinstance(make(), AsyncStrategy) else ROUNDS


def finite(result: Result) -> None:
    """Hold a run to weights that are numbers."""
    assert result.arrays
    assert all(np.isfinite(x).all() for x in as_numpy(result.arrays).values())


def ends_well(
    world: World, make: Callable[[], Strategy], failed_rounds: bool = False
) -> dict[str, np.ndarray]:
    """Hold a whole run to its versions, finite weights, and nothing counted twice.

    With `failed_rounds` a synchronous strategy may lack a version: its round brought nothing.
    """
    result = world.serve(make)
    finite(result)
    versions = [e["version"] for e in world.events("aggregated")]
    assert versions[-1] == world.rounds
    if failed_rounds and not isinstance(make(), AsyncStrategy):
        assert versions == sorted(set(versions))
    else:
        assert versions == list(range(1, world.rounds + 1))
    assert world.grid.violations == []
    for site in world.sites:
        ids = [e["order_id"] for e in world.arrived(site.name)]
        assert len(ids) == len(set(ids)), "an order arrived twice"
        assert all(n == 1 for n in site.trained.values()), "an order was trained twice"
        assert len(world.merged(site.name)) <= len(ids) or site.plain
    return as_numpy(result.arrays)


def run_scripted(strategy, *sites, rounds=1, log=None, **settings):
    """Run over scripted sites, by default one."""
    grid = FakeGrid(sites or [FakeSite("a", 1.0)])
    emit = (lambda event, **f: log.append((event, f))) if log is not None else Runtime().emit
    runtime = Runtime(clock=grid.clock, settings=Settings(**settings), emit=emit)
    config = ConfigRecord({"steps": 5})
    grid.clock.limit = 100_000.0
    return run_strategy(
        strategy, grid, initial_arrays(), rounds, train_config=config, runtime=runtime
    )
