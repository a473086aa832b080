"""Streaming DiLoCo at a site: the real trainer keeps its weights and merges fragments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds.train.streaming_scenarios as scenario
from worlds.train.torch_ranks import Team, start_team

KINDS = [pytest.param({"lora": lora}, id="lora" if lora else "full") for lora in (False, True)]


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Two ranks, so that every tensor is in two shards."""
    started = start_team(tmp_path_factory.mktemp("team"), 2)
    yield started
    started.close()


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_keeps_its_weights_and_merges_a_fragment(
    team: Team, tmp_path: Path, kind: dict[str, bool]
) -> None:
    """Protects the merge, the weights from evaluations and refusals, and what travels."""
    found = team.run(scenario.in_fragments, tmp_path, **kind)
    assert found["states"] == ["done", "failed", "done"]
    assert "run-a-000007" in found["error"]
    same(found["unharmed"], found["kept"])
    for name, before in found["kept"].items():
        given = found["given"].get(name)
        expected = before if given is None else 0.75 * given + 0.25 * before
        np.testing.assert_allclose(found["merged"][name], expected, rtol=1e-6, atol=1e-8)
    assert found["held_out"] == found["of the version"]  # and not of what the site mixes
    here, there = found["returned"]
    assert here.keys() == found["given"].keys()
    same(there, {name: found["end"][name] for name in found["end"].keys() - here.keys()})
    header = 8192  # at most; the first order's file and the second's make one model
    assert sum(found["bytes"]) <= sum(w.nbytes for w in found["end"].values()) + header


@pytest.mark.parametrize("kind", KINDS)
def test_a_fragment_is_merged_once(team: Team, tmp_path: Path, kind: dict[str, bool]) -> None:
    """Protects an order from its second job: it goes on from the checkpoint, already merged."""
    folders = [tmp_path / name for name in ("whole", "interrupted", "taken over")]
    for folder in folders:
        folder.mkdir()
    whole = team.run(scenario.in_fragments, folders[0], **kind)["end"]
    same(team.run(scenario.interrupted, folders[1], **kind), whole)
    same(team.run(scenario.taken_over, folders[2], **kind), whole)
