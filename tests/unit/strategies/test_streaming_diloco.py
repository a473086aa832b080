"""Streaming DiLoCo against hand computations: fragments, merging, overlap, lost weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from worlds.strategies.driven import Driven, delta
from worlds.strategies.grid import FakeGrid, FakeSite
from worlds.strategies.toy_model import as_numpy, pull_towards, with_nan
from worlds.strategies.world import Killed, World, ends_well

from flwr_hpc.protocol import STATUS, Order, Status, from_json
from strategies import HpcStrategy, Runtime, Settings
from strategies.diloco import DiLoCo
from strategies.parts.fragments import fragments
from strategies.streaming_diloco import StreamingDiLoCo

STEPS = 12
TARGETS = {"a": 1.0, "b": -2.0}
Weights = dict[str, np.ndarray]


def model(dtype: str = "float32") -> Weights:
    """Three layers of unlike sizes, in the order of a file and not of the alphabet."""
    rng = np.random.default_rng(3)
    shapes = {"layers.2.w": (5, 4), "layers.0.w": (4, 4), "layers.1.w": (3,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def record(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(w)) for name, w in weights.items()})


class Run:
    """A strategy over two scripted sites, of which `b` is the slower one."""

    def __init__(self, strategy: HpcStrategy, versions: int, **sites: Any) -> None:
        self.sites = [
            FakeSite(n, target, step_s=1.0 + k, **sites)
            for k, (n, target) in enumerate(TARGETS.items())
        ]
        self.grid, self.strategy, self.log = FakeGrid(self.sites), strategy, []
        settings = Settings(evaluate_every=0, final_evaluation_s=0.0, retry_delay_s=1.0)
        strategy.runtime = Runtime(clock=self.grid.clock, emit=self._emit, settings=settings)
        config = ConfigRecord({"steps": STEPS})
        self.result = strategy.start(self.grid, record(model()), versions, train_config=config)
        self.weights = as_numpy(self.result.arrays)

    def _emit(self, event: str, **fields: Any) -> None:
        fields["at"] = self.grid.clock.now()
        self.log.append((event, fields))


def by_hand(versions: int, count: int, alpha: float, lag: int) -> Weights:
    """Run the algorithm of the paper in double precision, with eta 0.7 and beta 0.9."""
    parts = fragments(record(model()), count)
    newest = model("float64")
    course, local = [newest], {name: dict(newest) for name in TARGETS}
    momentum = {name: np.zeros_like(w) for name, w in newest.items()}
    for window in range(versions):
        begin, before = max(0, window - lag), max(0, window - 1 - lag)
        base, moved = course[begin], []
        for site, target in TARGETS.items():
            here = local[site]
            for name in {n for past in range(before, begin) for n in parts[past % count]}:
                here[name] = (1 - alpha) * base[name] + alpha * here[name]
            here.update(pull_towards(target)(here, STEPS // count))
            moved.append({n: base[n] - here[n] for n in parts[window % count]})
        newest = dict(newest)
        for name in parts[window % count]:
            delta = (moved[0][name] + moved[1][name]) / 2
            momentum[name] = 0.9 * momentum[name] + delta
            newest[name] = newest[name] - 0.7 * (delta + 0.9 * momentum[name])
        course.append(newest)
    return newest


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_cycles_of_three_fragments_by_hand(alpha: float, overlap: bool) -> None:
    """Protects base, merge and momentum of every fragment, also when sites train on meanwhile."""
    run = Run(StreamingDiLoCo(fragments=3, alpha=alpha, overlap=overlap), 8)
    expected = by_hand(8, 3, alpha, int(overlap))
    for name, tensor in expected.items():
        np.testing.assert_allclose(run.weights[name], tensor, rtol=1e-4, atol=1e-5)
    assert list(run.weights) == list(model())


def test_one_fragment_is_diloco() -> None:
    """P = 1, alpha = 0: bit for bit, so it is the same algorithm."""
    streaming = Run(StreamingDiLoCo(fragments=1, alpha=0.0, overlap=False), 4)
    diloco = Run(DiLoCo(), 4)
    for name, tensor in diloco.weights.items():
        np.testing.assert_array_equal(streaming.weights[name], tensor)
    assert {o.steps for site in streaming.sites for o in site.orders} == {STEPS}


@pytest.mark.parametrize("overlap", [False, True])
def test_what_travels(overlap: bool) -> None:
    """A site is sent everything once, then what is new to it; it returns one fragment."""
    run = Run(StreamingDiLoCo(fragments=3, overlap=overlap), 7)
    parts, lag = run.strategy.parts, int(overlap)
    sent = [m.content for m in run.grid.pushed if m.metadata.message_type == "train"]
    for site in run.sites:
        assert [o.returns for o in site.orders] == [parts[w % 3] for w in range(7)]
        whole, *rest = [o.merges for o in site.orders]
        assert whole is None
        assert rest == [parts[(w - 1 - lag) % 3] if w > lag else [] for w in range(1, 7)]
        assert [o.version for o in site.orders] == [max(0, w - lag) for w in range(7)]
        assert {o.steps for o in site.orders} == {STEPS // 3}
    sizes = [sum(len(record) for record in content.array_records.values()) for content in sent]
    assert sorted(sizes) == sorted(2 * ([3] + [0] * lag + [1] * (6 - lag)))


def test_overlap_is_at_most_one_order() -> None:
    """The next order is there before one ends, and never a second one."""
    run = Run(StreamingDiLoCo(fragments=3), 7)
    under_way: dict[str, int] = dict.fromkeys(TARGETS, 0)
    most = 0
    for event, fields in run.log:
        if event in ("order_sent", "order_done"):
            under_way[fields["facility"]] += 1 if event == "order_sent" else -1
            most = max(most, *under_way.values())
    assert most == 2
    assert run.grid.violations == []


class Forgetful(FakeSite):
    """Loses the weights of its second order."""

    def _before(self, order: Any) -> str:
        return "lost" if order.options["after"] == 1 else super()._before(order)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_site_that_has_lost_its_weights_is_sent_all(overlap: bool, monkeypatch: Any) -> None:
    """It refuses the order, whose window closes without it, and takes part in the next one."""
    monkeypatch.setitem(globals(), "FakeSite", Forgetful)
    run = Run(StreamingDiLoCo(fragments=3, overlap=overlap), 7)
    for site in run.sites:
        seen = [o.merges is None for o in site.orders]
        assert seen[:2] == [True, False]
        assert sum(seen) == 2
    failed = [fields for event, fields in run.log if event == "order_failed"]
    assert {fields["reason"] for fields in failed} == {"no weights"}
    ids = [fields["order_id"] for fields in failed]
    assert len(ids) == len(set(ids))  # sent again, such an order would fail again
    assert all(np.isfinite(w).all() for w in run.weights.values())


def test_what_comes_after_its_window_is_dropped() -> None:
    """With a deadline the slow site's first report counts for nothing; it goes on all the same."""
    run = Run(StreamingDiLoCo(fragments=3, deadline_s=6.0, overlap=False), 2)
    merged = [fields["facilities"] for event, fields in run.log if event == "aggregated"]
    assert merged[0] == ["a"]
    alone = pull_towards(TARGETS["a"])(model(), STEPS // 3)
    (name,) = run.strategy.parts[0]
    step = 1.9 * 0.7 * (model()[name] - alone[name])
    np.testing.assert_allclose(run.weights[name], model()[name] - step, rtol=1e-5)


def test_ordinary_client_apps_get_and_give_whole_models() -> None:
    """They keep nothing: of what they return, the fragment is used."""
    run = Run(StreamingDiLoCo(fragments=3), 4, plain=True)
    assert {len(m.content["arrays"]) for m in run.grid.pushed if "arrays" in m.content} == {3}
    assert not np.array_equal(run.weights["layers.0.w"], model()["layers.0.w"])


# ---- lost reports -------------------------------------------------------------------------------


class Losing(FakeSite):
    """Its result of one order is no numbers (`how` is ``nan``), or comes of no steps."""

    def __init__(self, seq: int, how: str, **settings: Any) -> None:
        super().__init__("a", 1.0, step_s=2.0, **settings)
        self.seq, self.how, self.spoil = seq, how, self._spoil

    def _spoil(self, content: RecordDict) -> None:
        order_id = from_json(Status, str(content[STATUS]["json"])).order_id
        if self.how == "nan" and self.finish[order_id][1].seq == self.seq:
            with_nan(content)

    def _steps(self, order: Order) -> int:
        lost = self.how == "empty" and order.kind == "train" and order.seq == self.seq
        return 0 if lost else super()._steps(order)


def windows(site: FakeSite) -> list[int]:
    return [o.options["window"] for o in site.orders if o.kind == "train"]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("how", ["nan", "empty"])
@pytest.mark.parametrize("seq", [1, 3, 12])
def test_the_only_site_makes_up_for_a_lost_report(seq: int, how: str, overlap: bool) -> None:
    """Also when the order ahead of it has reported in the next window: nobody else closes it."""
    site = Losing(seq, how)
    world = World([site], rounds=12)
    ends_well(world, lambda: StreamingDiLoCo(overlap=overlap))
    found = windows(site)
    lost = found[seq - 1]  # number 0 made the initial weights
    again = 2 if overlap and seq not in (1, 12) else 1  # the first is alone, and so is the last
    assert found[seq - 1 + again] == lost
    assert sorted(found) == sorted([*range(12), lost])


@pytest.mark.parametrize("how", ["nan", "empty"])
def test_a_lost_report_and_a_death_at_every_moment(how: str) -> None:
    """A resumed run makes all versions, and each from one report of the only site."""
    whole = World([Losing(2, how)], rounds=5)
    ends_well(whole, StreamingDiLoCo)
    for k in range(whole.moments):
        world = World([Losing(2, how)], rounds=5)
        with pytest.raises(Killed):
            world.serve(StreamingDiLoCo, die_at=k)
        result = world.serve(StreamingDiLoCo)
        assert set(result.train_metrics_clientapp) == set(range(1, 6)), f"killed at moment {k}"
        assert all(n == 1 for n in world.sites[0].trained.values())
        assert sorted(set(windows(world.sites[0]))) == list(range(5))
        assert world.grid.violations == []


def test_the_survivor_makes_up_for_a_lost_report() -> None:
    """The other one, of whom the window could have come, is gone."""
    world = World([Losing(3, "nan"), FakeSite("gone", step_s=2.0)], rounds=12)
    world.grid.away("gone", 25.0)
    ends_well(world, StreamingDiLoCo)


def order_of(run: Driven, name: str, window: int, seq: int = 0) -> None:
    """Give a site the order of a window, as the engine hands it in."""
    order = Order("k", name, seq, "train", run.strategy.version, 50, options={"window": window})
    run.orders[name] = order, run.strategy.arrays, run.clock.t


def test_an_order_ahead_that_failed_is_not_waited_for() -> None:
    """It tells nobody: its site, late in the window before, would hold up the next one."""
    run = Driven(StreamingDiLoCo(fragments=2, deadline_s=100.0), sites="ab")
    a, b = run.strategy.sites.values()
    for site in (a, b):
        assert run.strategy.plan(site) is not None
        order_of(run, site.facility, 0)
    assert run.strategy.plan_next(b) is not None
    assert run.strategy.plan_next(b) is None  # failed: not asked for again at every poll
    run.arrive("a", delta(1.0))
    run.at(100.0)
    assert run.strategy.version == 1
    assert run.strategy.plan_next(b) is not None  # for the window after this one
    assert run.strategy.awaited() == set()
    assert run.strategy.plan(a) is not None
    order_of(run, "a", 1, 1)
    assert run.strategy.awaited() == {"a"}
    assert run.arrive("a", delta(1.0))


# ---- fragments ----------------------------------------------------------------------------------


def transformer(layers: int) -> ArrayRecord:
    rng = np.random.default_rng(0)
    sizes = {"model.embed_tokens.weight": 900, "model.norm.weight": 10, "lm_head.weight": 900}
    for n in range(layers):
        for part, size in (("self_attn.q_proj", 100), ("mlp.up_proj", 300), ("norm", 10)):
            sizes[f"model.layers.{n}.{part}.weight"] = size
    names = rng.permutation(sorted(sizes))
    return ArrayRecord({n: Array(np.zeros(sizes[n], np.float32)) for n in names})


@pytest.mark.parametrize(("layers", "count"), [(12, 1), (12, 4), (7, 3), (2, 4), (1, 50)])
def test_fragments_cover_the_model_once_and_are_balanced(layers: int, count: int) -> None:
    """Protects the peak: no fragment is larger than another by more than what cannot be cut."""
    arrays = transformer(layers)
    found = fragments(arrays, count)
    assert len(found) == min(count, len(arrays))
    assert sorted(n for part in found for n in part) == sorted(arrays)
    load = [sum(arrays[n].numpy().nbytes for n in part) for part in found]
    assert max(load) - min(load) <= 4 * 900
    assert fragments(ArrayRecord(dict(sorted(arrays.items()))), count) == found


def test_layers_stay_whole_and_are_dealt_out_in_turn() -> None:
    """The strided pattern of the paper: neighbours are in different fragments."""
    found = fragments(transformer(12), 4)
    layer = {n.split(".")[2]: k for k, part in enumerate(found) for n in part if ".layers." in n}
    whole = {(n.split(".")[2], k) for k, part in enumerate(found) for n in part if ".layers." in n}
    assert len(whole) == 12
    in_turn = [layer[str(n)] for n in range(4, 12)]  # the first ones balance the embeddings
    assert in_turn[:4] == in_turn[4:]
    assert len(set(in_turn)) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"fragments": 0},
        {"alpha": 1.0},
        {"alpha": -0.1},
        {"quorum": 0},
        {"deadline_s": 0},
        {"deadline_s": -1.0},
    ],
)
def test_arguments_that_make_no_sense(wrong: dict[str, Any]) -> None:
    """Refused with the name and the value."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        StreamingDiLoCo(**wrong)
