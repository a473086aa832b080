"""What every strategy must stand, ours and Flower's, in virtual time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_grid import FakeGrid, FakeSite, as_numpy, initial_arrays
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi, Result, Strategy
from hydra.utils import instantiate

import strategies
from flwr_hpc.protocol import TRAIN, Status
from strategies import (
    Arrival,
    AsyncDiLoCo,
    AsyncStrategy,
    DecoupledDiLoCo,
    DiLoCo,
    Engine,
    FedBackfill,
    FedBuff,
    FedCompass,
    FedQueue,
    HpcStrategy,
    RunFailed,
    Runtime,
    Settings,
    run_rounds,
)
from strategies.runtime import MemoryCheckpoints

ANY_NUMBER = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
ROUNDS = 3


class Mixing(AsyncStrategy):
    """A user's asynchronous strategy: every arrival is mixed in."""

    def on_arrival(self, arrival: Arrival, staleness: int) -> Any:
        assert arrival.arrays is not None
        alpha = np.float32(0.5 / (1 + staleness))
        for name, array in self.arrays.items():
            here = array.numpy()
            yield name, here + alpha * (arrival.arrays[name].numpy() - here)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg of ours": HpcStrategy,
    "diloco": DiLoCo,
    "fedbuff": lambda: FedBuff(buffer_size=3),
    "mixing": Mixing,
    "fedavg with a quorum": lambda: strategies.FedAvg(quorum=2, grace_s=0.0),
    "fedavg of two of three": lambda: strategies.FedAvg(sites_per_round=2, over_selection=1.5),
    "fedasync": lambda: strategies.FedAsync(alpha=0.6, staleness="hinge", a=1.0, b=1.0),
    "async diloco": AsyncDiLoCo,
    "decoupled diloco": lambda: DecoupledDiLoCo(quorum=2, grace_s=0.0),
    "fedcompass": lambda: FedCompass(min_steps=5, max_steps=20),
    "fedqueue": lambda: FedQueue(round_s=200.0, min_steps=5),
    "fedbackfill": lambda: FedBackfill(round_s=20.0, min_steps=5),
    "flower fedavg": lambda: FedAvg(**ANY_NUMBER),
    "flower fedavgm": lambda: FedAvgM(**ANY_NUMBER, server_momentum=0.9),
    "flower fedadam": lambda: FedAdam(**ANY_NUMBER),
    "flower fedyogi": lambda: FedYogi(**ANY_NUMBER),
}


def run(
    strategy: Strategy, grid: FakeGrid, runtime: Runtime, arrays: ArrayRecord, engine: Engine
) -> Result:
    """Start a strategy the way the server application does."""
    config = ConfigRecord({"steps": 10})
    if isinstance(strategy, HpcStrategy):
        strategy.runtime, strategy.engine = runtime, engine
        return strategy.start(grid, arrays, ROUNDS, train_config=config)
    return run_rounds(
        strategy, grid, arrays, ROUNDS, train_config=config, runtime=runtime, engine=engine
    )


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


class MortalCheckpoints(MemoryCheckpoints):
    """Tells before and after everything it does."""

    moment: Callable[[], None] = staticmethod(lambda: None)

    def put(self, name: str, tensors: Any) -> ArrayRecord:
        record = super().put(name, tensors)
        self.moment()
        return record

    def commit(self, state: dict[str, Any]) -> None:
        self.moment()
        super().commit(state)
        self.moment()


@dataclass
class World:
    """Sites, clock and checkpoints outlive a server process."""

    sites: list[FakeSite]
    settings: Settings = field(default_factory=Settings)
    checkpoints: MortalCheckpoints = field(default_factory=MortalCheckpoints)
    moments: int = 0  # at which the last server process could have died
    log: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grid = FakeGrid(self.sites)

    def serve(self, make: Callable[[], Strategy], *, die_at: int | None = None) -> Result:
        """Run one server process; it dies at its `die_at`-th event, put or commit."""
        self.moments = 0
        self.grid.new_run()

        def moment() -> None:
            if self.moments == die_at:
                raise Killed
            self.moments += 1

        def emit(event: str, **fields: Any) -> None:
            self.log.append((event, fields))
            moment()

        self.checkpoints.moment = moment
        runtime = Runtime(self.grid.clock, emit, self.checkpoints, "k", self.settings)
        engine = Engine(self.grid, runtime)
        engine.wait_for([s.name for s in self.sites if not s.plain], timeout=1000)
        arrays = ArrayRecord()
        if engine.restored is None:
            launchers = any(site.launcher for site in engine.sites.values())
            arrays = engine.initialize()[0] if launchers else initial_arrays()
        result = run(make(), self.grid, runtime, arrays, engine)
        engine.release()
        return result

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.log if event == name]


def sites() -> list[FakeSite]:
    return [
        FakeSite("a", 1.0, queue_s=70.3, step_s=1.1, examples=10),
        FakeSite("b", -1.0, queue_s=3.1, step_s=9.7, examples=20),
        FakeSite("c", 3.0, load_s=11.4, step_s=2.3, examples=30),
    ]


def finite(result: Result) -> None:
    assert result.arrays
    assert all(np.isfinite(x).all() for x in as_numpy(result.arrays).values())


each = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES.keys())


@each
def test_a_run_makes_its_versions(make):
    """Three rounds, three versions, the last one evaluated at every site, nothing forbidden."""
    world = World(sites())
    result = world.serve(make)
    finite(result)
    assert [e["version"] for e in world.events("aggregated")] == [1, 2, 3]
    assert set(result.train_metrics_clientapp) == {1, 2, 3}
    last = {e["facility"] for e in world.events("evaluated") if e["version"] == ROUNDS}
    assert last == {"a", "b", "c"}
    assert world.grid.violations == []
    assert [s.released for s in world.sites] == [1, 1, 1]
    for event in world.events("aggregated"):
        assert set(event["weights"]) == set(event["staleness"]) == set(event["facilities"])


@each
def test_a_version_is_evaluated_once(make):
    """Evaluation costs node hours: each (facility, version) once at most."""
    world = World(sites())
    world.serve(make)
    seen = [(e["facility"], e["version"]) for e in world.events("evaluated")]
    assert len(seen) == len(set(seen))


@each
def test_kill_at_every_moment_and_resume(make):
    """Wherever the server dies, the resumed run ends with the same bits and trains no more."""
    whole = World(sites())
    expected = as_numpy(whole.serve(make).arrays)
    trained = [set(site.trained) for site in whole.sites]
    for k in range(whole.moments):
        world = World(sites())
        with pytest.raises(Killed):
            world.serve(make, die_at=k)
        result = as_numpy(world.serve(make).arrays)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(result[name], tensor, err_msg=f"killed at moment {k}")
        assert [set(site.trained) for site in world.sites] == trained, f"killed at moment {k}"
        assert world.grid.violations == []


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


@each
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


@each
def test_one_site_only(make):
    """A federation of one."""
    world = World([FakeSite("a", 1.0)])
    finite(world.serve(make))


@each
def test_a_dead_site_does_not_block(make):
    """It dies in the first order and never comes back."""
    world = World(sites(), Settings(offline_grace_s=100))
    world.grid.away("b", 80)
    finite(world.serve(make))
    assert world.grid.violations == []


@each
def test_a_site_that_restarts_often(make):
    """Each time as another node; no order is trained twice."""
    world = World(sites())
    for at in (50, 90, 200, 400):
        world.grid.restart("b", at=at)
    finite(world.serve(make))
    assert all(n == 1 for site in world.sites for n in site.trained.values())


@each
def test_duplicate_replies(make):
    """Every reply twice changes no bit."""
    expected = as_numpy(World(sites()).serve(make).arrays)
    world = World(sites())
    world.grid.duplicate = True
    result = as_numpy(world.serve(make).arrays)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(result[name], tensor)


@each
def test_killed_client_apps(make):
    """Error replies of code 8 are retried and change no bit."""
    world = World(sites())
    world.grid.errors[TRAIN] = [8] * 2
    finite(world.serve(make))


@each
def test_a_site_that_returns_nan(make):
    """It is rejected, and the run goes on with the others."""
    bad = FakeSite("n", nan=True, step_s=2.0)
    world = World([*sites(), bad])
    bad_arrays = world.serve(make)
    finite(bad_arrays)
    assert world.events("order_rejected")
    assert all("n" not in e["facilities"] for e in world.events("aggregated"))


@each
def test_a_site_that_never_starts(make):
    """Its queue outlasts the run; the deadline leaves it out."""
    world = World([*sites(), FakeSite("q", queue_s=1e7)], Settings(acquire_deadline_s=500))
    finite(world.serve(make))
    assert all("q" not in e["facilities"] for e in world.events("aggregated"))


@each
def test_every_site_fails(make):
    """The run ends and says why."""
    broken = [FakeSite(n, fail=Status("failed", error="quota exceeded")) for n in "ab"]
    with pytest.raises(RunFailed, match="quota exceeded"):
        World(broken).serve(make)


@each
def test_metrics_of_unequal_keys(make):
    """One site knows its MFU, the others do not: Flower's averaging must not stop the run."""
    some = sites()
    some[0].extra_metrics = {"mfu": 0.4}
    finite(World(some).serve(make))


@each
def test_plain_client_apps(make):
    """Ordinary ClientApps need none of our protocol."""
    world = World([FakeSite("x", 1.0, plain=True), FakeSite("y", 2.0, plain=True, step_s=5)])
    finite(world.serve(make))
    assert world.grid.violations == []


@each
def test_a_site_joins_mid_run(make):
    """It takes part from then on."""
    world = World(sites())
    late = FakeSite("late", 2.0, step_s=0.3)
    node = world.grid.join(late)
    world.grid.offline[node] = [(0.0, 40.0)]
    finite(world.serve(make))
    assert late.trained


# ---- one strategy against another ---------------------------------------------------------------


def plain_grid(dtype: str = "float64") -> tuple[FakeGrid, ArrayRecord]:
    two = [
        FakeSite("x", 1.0, plain=True, examples=10),
        FakeSite("y", 2.0, plain=True, examples=30, step_s=5),
    ]
    return FakeGrid(two), initial_arrays(dtype)


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdam, FedYogi])
def test_flowers_strategies_do_as_in_flower(kind, monkeypatch):
    """run_rounds gives what Flower's own start gives: arrays and all metrics."""
    config = {"train_config": ConfigRecord({"steps": 3})}

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"norm": float(np.square(arrays["layer.bias"].numpy()).sum())})

    grid, arrays = plain_grid()
    theirs = kind(**ANY_NUMBER).start(grid, arrays, 4, evaluate_fn=evaluate, **config)
    grid, arrays = plain_grid()
    runtime = Runtime(clock=grid.clock)
    ours = run_rounds(
        kind(**ANY_NUMBER), grid, arrays, 4, evaluate_fn=evaluate, runtime=runtime, **config
    )
    for name, tensor in as_numpy(theirs.arrays).items():
        np.testing.assert_allclose(as_numpy(ours.arrays)[name], tensor, rtol=1e-12)
    for history in (
        "train_metrics_clientapp",
        "evaluate_metrics_clientapp",
        "evaluate_metrics_serverapp",
    ):
        expected, found = getattr(theirs, history), getattr(ours, history)
        assert set(found) == set(expected)
        for r in expected:
            assert dict(found[r]) == pytest.approx(dict(expected[r]), rel=1e-9)


def test_the_dtype_of_the_model_is_kept():
    """Flower's FedAdam makes float64 of float32; a model keeps its dtype over the rounds."""
    grid, arrays = plain_grid("float32")
    result = run_rounds(FedAdam(**ANY_NUMBER), grid, arrays, 2, runtime=Runtime(clock=grid.clock))
    assert {x.dtype for x in as_numpy(result.arrays).values()} == {np.dtype("float32")}


def test_diloco_without_outer_optimizer_is_fedavg():
    """eta = 1, beta = 0."""
    results = []
    for strategy in (
        DiLoCo(outer_lr=1.0, momentum=0.0, weighted_by="num-examples"),
        FedAvg(**ANY_NUMBER),
    ):
        world = World(sites())
        results.append(as_numpy(world.serve(lambda s=strategy: s).arrays))
    for name, tensor in results[1].items():
        np.testing.assert_allclose(results[0][name], tensor, rtol=1e-5, atol=1e-6)


def test_diloco_by_hand():
    """Two rounds of two sites with momentum, computed here from the site's own training."""
    from fake_grid import pull_towards

    world = World([FakeSite("a", 1.0), FakeSite("b", -3.0, step_s=2)])
    found = as_numpy(world.serve(lambda: DiLoCo(outer_lr=0.7, momentum=0.9)).arrays)
    theta = {k: v.astype(np.float64) for k, v in as_numpy(initial_arrays()).items()}
    m = {k: np.zeros_like(v) for k, v in theta.items()}
    for _ in range(ROUNDS):
        trained = [pull_towards(t)(theta, 10) for t in (1.0, -3.0)]
        for k in theta:
            delta = theta[k] - (trained[0][k] + trained[1][k]) / 2
            m[k] = 0.9 * m[k] + delta
            theta[k] = theta[k] - 0.7 * (delta + 0.9 * m[k])
    for name, tensor in theta.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_fedbuff_takes_the_delta_against_the_version_it_started_from():
    """And the staleness from the download: computed here from the event log."""
    from fake_grid import pull_towards

    world = World([FakeSite("a", 1.0, step_s=1.0), FakeSite("b", -3.0, step_s=3.3)])
    found = as_numpy(world.serve(lambda: FedBuff(buffer_size=2)).arrays)
    target = {"a": 1.0, "b": -3.0}
    versions = [as_numpy(initial_arrays())]
    buffer: list[tuple[float, dict[str, np.ndarray]]] = []
    for done in (e for e in world.events("order_done") if e["kind"] == "train"):
        if len(versions) > ROUNDS:
            break
        base = versions[done["version"]]
        trained = pull_towards(target[done["facility"]])(base, 10)
        weight = (1 + len(versions) - 1 - done["version"]) ** -0.5
        buffer.append((weight, {k: base[k] - trained[k] for k in base}))
        if len(buffer) == 2:
            new = {k: v - sum(w * d[k] for w, d in buffer) / 2 for k, v in versions[-1].items()}
            versions, buffer = [*versions, new], []
    assert any(max(e["staleness"].values()) > 0 for e in world.events("aggregated"))
    for name, tensor in versions[-1].items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [DiLoCo, lambda: FedBuff(buffer_size=2)])
def test_checkpoints_do_not_grow(make):
    """Only what is needed is kept: the store's size does not grow with the rounds."""
    world = World(sites())
    world.serve(make)
    state = world.checkpoints.restore()
    assert state is not None
    assert len(state["tensors"]) <= 4


def test_start_under_plain_flower_needs_no_surroundings():
    """Our strategies run as any other: Strategy(...).start(grid, arrays)."""
    grid, arrays = plain_grid()
    strategy = DiLoCo()
    strategy.runtime = Runtime(clock=grid.clock)  # virtual time is all that is special
    result = strategy.start(grid, arrays, num_rounds=2, train_config=ConfigRecord({"steps": 2}))
    assert set(result.train_metrics_clientapp) == {1, 2}
    assert result.evaluate_metrics_clientapp[2]


# ---- the page for those who write their own -----------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
NAMES_OF_EXAMPLES = [re.findall(r"^class (\w+)", code, flags=re.MULTILINE)[0] for code in EXAMPLES]


@pytest.mark.parametrize(("code", "name"), zip(EXAMPLES, NAMES_OF_EXAMPLES, strict=True))
def test_the_examples_of_the_page_run(code, name, tmp_path, monkeypatch):
    """Each is a module of a user's, found by `_target_`, and survives a kill."""
    (tmp_path / f"module_of_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    make = partial(instantiate, {"_target_": f"module_of_{name}.{name}"})
    whole, world = World(sites()), World(sites())
    expected = as_numpy(whole.serve(make).arrays)
    with pytest.raises(Killed):
        world.serve(make, die_at=whole.moments // 2)
    result = as_numpy(world.serve(make).arrays)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(result[key], tensor)


def test_the_first_example_is_short():
    """The page promises twenty lines."""
    assert len(EXAMPLES[0].strip().splitlines()) <= 20
