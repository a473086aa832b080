"""What the event of a version tells of the adapters in it, strategy by strategy."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from worlds.strategies import grid as grid_world
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import as_numpy, pull_towards
from worlds.strategies.world import ANY_NUMBER, STRATEGIES

from strategies import Runtime, run_strategy
from strategies.fedasync import FedAsync

A, B = "q.lora_A.weight", "q.lora_B.weight"
SILENT = {  # The centre of robust_fedavg is no average
    *("decoupled_diloco", "streaming_diloco", "streaming diloco without overlap", "mixing"),
    *("robust_fedavg", "private"),
}
EXACT = {"fedex_lora", "flora"}
STEPS = 3


def adapters():
    """Return an adapter of rank 2 as it is after some training: B is not 0."""
    rng = np.random.default_rng(3)
    tensors = {A: rng.normal(size=(2, 7)), B: rng.normal(size=(5, 2))}
    return ArrayRecord({n: Array(t.astype(np.float32)) for n, t in tensors.items()})


@pytest.fixture(autouse=True)
def evaluated(monkeypatch):
    """The scripted sites evaluate the first of the model's tensors."""
    monkeypatch.setattr(grid_world, "NAMES", (B, A))


def versions(strategy, arrays, rounds=4):
    """Run over three unlike sites and return the events of the versions."""
    sites = [FakeSite(n, t, examples=e) for n, t, e in (("a", 1, 10), ("b", -2, 30), ("c", 3, 20))]
    log: list = []
    grid = FakeGrid(sites)
    grid.clock.limit = 1e6
    runtime = Runtime(grid.clock, lambda event, **fields: log.append((event, fields)))
    config = ConfigRecord({"steps": STEPS})
    run_strategy(strategy, grid, arrays, rounds, train_config=config, runtime=runtime)
    return [fields for event, fields in log if event == "aggregated"]


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_average_is_measured(name):
    """Protects the report of a run with adapters: each version has a figure, or says why not."""
    told = versions(STRATEGIES[name](), adapters())
    assert len(told) == 4
    for version in told:
        if name in SILENT:
            assert version["lora_inexactness"] is None
            unknown = version["lora_inexactness_unknown"]
            assert "does not say how it averages" in unknown or "is not known to" in unknown
        elif name in EXACT:
            assert version["lora_inexactness"] < 1e-8 < version["lora_inexactness_removed"] < 10.0
        else:
            assert 0.0 < version["lora_inexactness"] < 10.0


def test_the_figure_is_that_of_the_replies():
    """Protects its meaning: sites' products averaged, against the product of the averages."""
    theta = as_numpy(adapters())
    sites = [pull_towards(target)(theta, STEPS) for target in (1, -2, 3)]
    w = [1 / 6, 3 / 6, 2 / 6]
    exact = sum(c * s[B].astype(float) @ s[A] for c, s in zip(w, sites, strict=True))
    a, b = (sum(c * s[n].astype(float) for c, s in zip(w, sites, strict=True)) for n in (A, B))
    expected = np.linalg.norm(exact - b @ a) / np.linalg.norm(exact)
    told = versions(FedAvg(**ANY_NUMBER), adapters(), rounds=1)
    assert told[0]["lora_inexactness"] == pytest.approx(expected, rel=1e-5)


def test_one_reply_is_averaged_with_the_global_adapter():
    """Protects FedAsync's figure: alpha of a reply and the rest of the version before."""
    told = versions(FedAsync(alpha=0.5), adapters(), rounds=1)
    theta = as_numpy(adapters())
    targets = {"a": 1, "b": -2, "c": 3}
    site = pull_towards(targets[told[0]["facilities"][0]])(theta, STEPS)
    exact = (theta[B].astype(float) @ theta[A] + site[B].astype(float) @ site[A]) / 2
    apart = exact - (theta[B] + site[B]).astype(float) @ (theta[A] + site[A]) / 4
    expected = np.linalg.norm(apart) / np.linalg.norm(exact)
    assert told[0]["lora_inexactness"] == pytest.approx(expected, rel=1e-5)


def test_rules_that_do_not_average_say_so():
    """Protects the reader of a median's report from a figure that means nothing."""
    (told,) = versions(FedMedian(**ANY_NUMBER), adapters(), rounds=1)
    assert told["lora_inexactness"] is None
    assert told["lora_inexactness_unknown"] == "FedMedian is not known to average the replies"


@pytest.mark.parametrize(
    "make", [lambda: FedAdam(**ANY_NUMBER), STRATEGIES["fedbuff"]], ids=["rounds", "asynchronous"]
)
def test_other_models_are_not_measured(make, monkeypatch):
    """Protects runs of whole models: no field, and no time spent."""
    monkeypatch.setattr(grid_world, "NAMES", ("q.weight",))
    whole = ArrayRecord({"q.weight": Array(np.ones((3, 2), np.float32))})
    assert all("lora_inexactness" not in told for told in versions(make(), whole))
