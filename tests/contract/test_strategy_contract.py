"""What every strategy must do, ours and Flower's, in virtual time.

The strategies are the rows of `strategy_world.STRATEGIES`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from worlds.strategies.grid import FakeSite
from worlds.strategies.toy_model import as_numpy, initial_arrays
from worlds.strategies.world import ROUNDS, Killed, World, each, finite, sites

from flwr_hpc.server.preflight import models_kept


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
def test_no_more_is_kept_on_disk_than_is_said(make):
    """Protects a run that does not fit from beginning: that is what its disk is checked for."""
    world = World(sites())
    world.serve(make)
    bases = len(world.sites)  # versions that their orders started from
    most = 2 + models_kept(make(), len(world.sites)) + bases
    model = sum(array.numpy().nbytes for array in initial_arrays().values())
    assert world.checkpoints.most <= most * model


@each
def test_one_site_only(make):
    """A federation of one."""
    world = World([FakeSite("a", 1.0)])
    finite(world.serve(make))


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
