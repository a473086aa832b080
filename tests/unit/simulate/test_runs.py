"""Whole simulated runs: the network, determinism, what does not grow, and faithful engines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from flwr_hpc import protocol
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.simulate import federation, identity
from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.compare import Row, rows, scenario_of
from flwr_hpc.simulate.config import QueueModel, ScenarioConfig, SimulateConfig, SiteModel
from flwr_hpc.simulate.facility import Facility
from flwr_hpc.simulate.federation import RunOutcome, RunSettings, simulate
from flwr_hpc.simulate.grid import SimulatedGrid
from flwr_hpc.simulate.identity import take_identity
from flwr_hpc.simulate.learning.surrogate import SurrogateLearner
from flwr_hpc.simulate.queues.models import NoQueue
from flwr_hpc.simulate.site import SimulatedSite

STRATEGIES: dict[str, dict[str, Any]] = {
    "flower fedavg": {
        "_target_": "flwr.serverapp.strategy.FedAvg",
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    },
    "fedavg": {"_target_": "strategies.fedavg.FedAvg", "deadline_s": 3600.0},
    "diloco": {"_target_": "strategies.diloco.DiLoCo"},
    "fedasync": {"_target_": "strategies.fedasync.FedAsync"},
    "fedbuff": {"_target_": "strategies.fedbuff.FedBuff", "buffer_size": 3},
    "async diloco": {"_target_": "strategies.async_diloco.AsyncDiLoCo"},
    "decoupled": {"_target_": "strategies.decoupled_diloco.DecoupledDiLoCo"},
    "fedcompass": {"_target_": "strategies.fedcompass.FedCompass"},
    "fedqueue": {"_target_": "strategies.fedqueue.FedQueue", "round_s": 600.0},
    "fedbackfill": {"_target_": "strategies.fedbackfill.FedBackfill"},
    "streaming diloco": {"_target_": "strategies.streaming_diloco.StreamingDiLoCo", "alpha": 0.0},
}
HOSTILE: dict[str, Any] = {
    "walltime": "00:40:00",
    "preemptions_per_hour": 1.0,
    "failures_per_hour": 0.3,
    "queue": QueueModel(median_s=600.0, sigma=1.0),
}


def hostile(**scenario: Any) -> ScenarioConfig:
    sites = {
        "a": SiteModel(step_s=2.0, **HOSTILE),
        "b": SiteModel(step_s=5.0, outages=[[3600, 9000]], **HOSTILE),
        "c": SiteModel(step_s=16.0, joins_s=4000.0, leaves_s=40000.0, **HOSTILE),
    }
    return ScenarioConfig(sites, **{"target": 1.3, "horizon_h": 100.0, **scenario})


# ---- the network --------------------------------------------------------------------------------


def describe() -> Message:
    return Message(RecordDict(), 1, protocol.DESCRIBE)


def test_flower_keeps_its_identity_where_we_look(monkeypatch):
    """The one reach behind Flower's public API holds for the installed Flower, or says so."""
    take_identity()
    assert describe().metadata.src_node_id == 1
    monkeypatch.setattr(identity, "Message", type("Message", (), {}))
    with pytest.raises(RuntimeError, match="keeps its identity elsewhere"):
        take_identity()


def one_site(**facility: Any) -> tuple[VirtualClock, SimulatedGrid]:
    clock = VirtualClock()
    grid = SimulatedGrid(clock)
    shape = Facility(**{"step_s": 1.0, "latency_s": 1.0, **facility})
    site = SimulatedSite(
        "x", 0, shape, NoQueue(), SurrogateLearner(1, 0), clock, np.random.default_rng(0)
    )
    grid.join(site)
    return clock, grid


def test_a_node_handles_one_message_at_a_time():
    """As a SuperNode does: what comes second waits for the first to be answered."""
    clock, grid = one_site()
    wait = RecordDict({protocol.WAIT: ConfigRecord({"wait_s": 1000.0})})
    acquire, question = grid.push_messages([Message(wait, 1, protocol.ACQUIRE), describe()])
    clock.advance(60.0)
    assert grid.pull_messages([acquire, question]) == []  # the job takes 60 s to load
    clock.advance(63.0)
    kinds = [m.metadata.message_type for m in grid.pull_messages([acquire, question])]
    assert kinds == [protocol.ACQUIRE, protocol.DESCRIBE]
    assert grid.pull_messages([acquire, question]) == []  # a reply is delivered once


def test_a_message_takes_its_time_at_the_site():
    """As Flower's processes do, one after the other."""
    clock, grid = one_site(message_s=4.0)
    ids = grid.push_messages([describe(), describe()])
    answered = []
    for second in range(1, 12):
        clock.advance(float(second))
        answered += [second] * len(grid.pull_messages(ids))
    assert answered == [1 + 4, 1 + 4 + 4]


def test_an_offline_node_takes_no_messages():
    """Refused as by the SuperLink: an empty id."""
    clock, grid = one_site(outages=((100.0, 200.0),))
    assert (grid.get_node_ids(), grid.push_messages([describe()])) == ([1], ["m1"])
    clock.advance(150.0)
    assert (grid.get_node_ids(), grid.push_messages([describe()])) == ([], [""])
    clock.advance(200.0)
    assert grid.get_node_ids() == [1]


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["warm", "per_round"])
@pytest.mark.parametrize("spec", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_every_strategy_learns_where_everything_goes_wrong(spec, policy):
    """Preemption, failures, an outage, sites that join and leave: the loss falls all the same."""
    outcome = simulate(
        hostile(target=1.7),
        "x",
        spec,
        RunSettings(policy=policy, max_successors=1, steps=50, learning="surrogate"),
    )
    assert not outcome.error
    assert outcome.reached
    assert outcome.curve[-1][2] <= 1.7 < outcome.curve[0][2]
    hours, nodes = ([p[k] for p in outcome.curve] for k in (0, 1))
    assert hours == sorted(hours)
    assert nodes == sorted(nodes)


@pytest.mark.parametrize("learning", ["network", "surrogate"])
@pytest.mark.parametrize("name", ["flower fedavg", "fedqueue", "fedbackfill"])
def test_a_run_is_that_of_its_seed(name, learning):
    """The same curve, bit for bit, from the same seed; another one from another."""
    first, again, other = (
        simulate(
            hostile(),
            name,
            STRATEGIES[name],
            RunSettings(seed=s, steps=20, learning=learning, versions=4),
        )
        for s in (3, 3, 4)
    )
    assert first == again
    assert first.curve != other.curve
    assert len(first.curve) > 1


def test_the_horizon():
    """A run that does not get there says so, and took until then."""
    outcome = simulate(
        hostile(target=0.01, horizon_h=5.0),
        "x",
        STRATEGIES["diloco"],
        RunSettings(learning="surrogate"),
    )
    assert not outcome.reached
    assert outcome.error == "the simulation ended after 18000 s"
    assert outcome.hours <= 5.0


def test_warm_allocations_spare_the_queue():
    """The same strategy with a job per order waits in the queue for each of them."""
    spec, hours = STRATEGIES["diloco"], {}
    sites = {n: SiteModel(step_s=2.0, queue=QueueModel(median_s=1800, sigma=0.1)) for n in "ab"}
    scenario = ScenarioConfig(sites, target=1.05)
    for policy in ("warm", "per_round"):
        hours[policy] = simulate(
            scenario, "x", spec, RunSettings(policy=policy, learning="surrogate")
        ).hours
    assert hours["warm"] < 0.6 * hours["per_round"]


@pytest.mark.parametrize("kind", ["none", "cluster"])
def test_other_queues(kind):
    """Each model carries a run."""
    queue = QueueModel(kind=kind, mean_runtime_s=600.0)
    scenario = ScenarioConfig({n: SiteModel(queue=queue) for n in "ab"}, target=1.5)
    assert simulate(
        scenario, "x", STRATEGIES["fedbackfill"], RunSettings(learning="surrogate")
    ).reached


def test_a_queue_of_a_trace(tmp_path):
    """The waits of the file."""
    trace = tmp_path / "t.swf"
    trace.write_text("1 0 7777 60 1 -1 -1 1 7200 -1 1 1 1 1 1 1 -1 -1\n")
    queue = QueueModel(kind="trace", trace=str(trace))
    scenario = ScenarioConfig({"a": SiteModel(queue=queue)}, target=1.5)
    outcome = simulate(scenario, "x", STRATEGIES["diloco"], RunSettings(learning="surrogate"))
    first = outcome.segments["a"][0]
    assert (first.what, first.end - first.begin) == ("queue", 7777.0)


def test_a_replayed_queue_and_an_initial_order():
    """The first job that starts makes the initial weights, as on real sites; it is one more job
    with a job per order."""
    waits = {"a": [30.0, 40.0, 50.0], "b": [60.0, 70.0, 80.0]}
    sites = {n: SiteModel(queue=QueueModel(kind="replay", waits_s=w)) for n, w in waits.items()}
    outcome = simulate(
        ScenarioConfig(sites, target=0.0), "x", STRATEGIES["diloco"],
        RunSettings(policy="per_round", learning="surrogate", versions=1, initialize=True),
    )  # fmt: skip
    queued = {n: [s for s in own if s.what == "queue"] for n, own in outcome.segments.items()}
    took = {n: [round(s.end - s.begin, 6) for s in own] for n, own in queued.items()}
    assert took == {"a": [30.0, 40.0], "b": [60.0]}


def test_a_queue_of_a_history_that_is_empty():
    """No run has been there yet: what to do instead."""
    scenario = ScenarioConfig({"nowhere": SiteModel(queue=QueueModel(kind="history"))})
    with pytest.raises(UserError, match="no run has kept waits of facility 'nowhere'"):
        simulate(scenario, "x", STRATEGIES["diloco"], RunSettings())


# ---- size ---------------------------------------------------------------------------------------


def crowd(sites: int) -> ScenarioConfig:
    models = {
        f"s{k:03d}": SiteModel(step_s=1.0 + k % 5, queue=QueueModel(median_s=300.0))
        for k in range(sites)
    }
    return ScenarioConfig(models, target=1e-9, horizon_h=1e4)


class Spied:
    """Keeps the engine, the grid and the store of a run to look at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[int] = []
        plain, store = federation.Engine, federation._Memory

        def engine(grid: Any, runtime: Any) -> Any:
            self.engine, self.grid = plain(grid, runtime), grid
            return self.engine

        class Store(store):
            def commit(this, state: dict[str, Any]) -> None:
                super().commit(state)
                self.kept.append(len(this._records))

        monkeypatch.setattr(federation, "Engine", engine)
        monkeypatch.setattr(federation, "_Memory", Store)

    def tables(self) -> int:
        """How many things the server and the network remember."""
        e, g = self.engine, self.grid
        tables = [
            e._memory.orders,
            e._memory.seq,
            e._tracker.current,
            e._transport._flights,
            g._replies,
        ]
        return sum(len(t) for t in tables)


def test_two_hundred_facilities():
    """A federation of the size of a continent finishes, with every site in it."""
    outcome = simulate(
        crowd(200),
        "x",
        {"_target_": "strategies.fedbuff.FedBuff", "buffer_size": 50},
        RunSettings(steps=20, learning="surrogate", versions=10, evaluate_every_s=600.0),
    )
    assert (outcome.versions, outcome.error) == (10, "")
    assert outcome.orders >= 500


@pytest.mark.parametrize("name", ["flower fedavg", "fedbuff", "fedcompass", "fedbackfill"])
def test_the_servers_memory_does_not_grow_with_the_orders(name, monkeypatch):
    """Six times the versions: the store and the tables are as large as before."""
    sizes = []
    for versions in (10, 60):
        spied = Spied(monkeypatch)
        simulate(
            crowd(4),
            "x",
            STRATEGIES[name],
            RunSettings(steps=5, learning="surrogate", versions=versions, evaluate_every_s=600.0),
        )
        monkeypatch.undo()
        sizes.append((max(spied.kept), spied.tables()))
    assert sizes[1][0] <= sizes[0][0] + 4
    assert sizes[1][1] <= sizes[0][1] + 8


# ---- rows and facilities ------------------------------------------------------------------------


def outcome(hours: float, reached: bool = True, loss: float = 1.0, name: str = "s") -> RunOutcome:
    curve = [(hours, 2 * hours, loss)]
    return RunOutcome(name, 0, "warm", curve, reached, hours, 2 * hours, versions=int(hours))


def test_rows():
    """Medians and quartiles; a run that did not get there took longer than any that did."""
    row = rows([outcome(h) for h in (4.0, 1.0, 2.0, 3.0, 5.0)])[0]
    assert (row.hours_low, row.hours, row.hours_high, row.node_hours) == (2.0, 3.0, 4.0, 6.0)
    assert (row.runs, row.reached, row.versions) == (5, 5, 3)
    row = rows([outcome(1.0), outcome(2.0), outcome(240.0, reached=False)])[0]
    assert (row.hours_low, row.hours, row.hours_high, row.reached) == (1.5, 2.0, None, 2)
    row = rows([outcome(1.0), outcome(9.0, reached=False), outcome(9.0, reached=False)])[0]
    assert (row.hours, row.node_hours) == (None, None)


def test_rows_of_runs_without_a_loss():
    """One that diverged, one that never began."""
    assert rows([outcome(1.0, False, math.nan)])[0].loss is None
    assert rows([RunOutcome("s", 0, "warm")])[0].loss is None


def test_rows_keep_the_order():
    """That of the command."""
    found = rows([outcome(2.0, name="z"), outcome(1.0, name="a"), outcome(2.0, name="z")])
    assert [(r.strategy, r.runs) for r in found] == [("z", 2), ("a", 1)]
    assert isinstance(found[0], Row)


def test_facilities_take_the_places_of_the_sites():
    """Steps by their peak, nodes and walltime of theirs, the queue of the scenario's site."""
    config = SimulateConfig(
        ScenarioConfig({"a": SiteModel(queue=QueueModel(median_s=77.0), transfer_s=9.0)}),
        facilities={
            "x": FacilityConfig(nodes=2, gpus_per_node=4, peak_tflops=624.0, walltime="03:00:00"),
            "y": FacilityConfig(nodes=1),
        },
    )
    sites = scenario_of(config).sites
    assert list(sites) == ["x", "y"]
    assert (sites["x"].step_s, sites["x"].nodes, sites["x"].walltime) == (0.5, 2, "03:00:00")
    assert [s.queue.median_s for s in sites.values()] == [77.0, 77.0]
    assert sites["y"].step_s == SiteModel().step_s


def test_a_facility_whose_walltime_is_too_short():
    """It would never train: said at once."""
    config = SimulateConfig(
        ScenarioConfig({"a": SiteModel()}), facilities={"x": FacilityConfig(walltime="00:01:00")}
    )
    with pytest.raises(UserError, match=r"facilities\.x\.walltime=00:01:00 leaves no time"):
        scenario_of(config)
