"""Real workers whose ranks each write their own part of the weights."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from worlds.train.torch_ranks import read_back
from worlds.train.worker_site import FAST, SLOW, Site

from flwr_hpc.exchange.shards.manifest import files_of

SHARDED = dataclasses.replace(FAST, shards_above_mb=0.0)


def test_shards_survive_a_kill_and_a_change_of_ranks(site: Site) -> None:
    """kill -9 when the shards are written and the checkpoint is not: the order is trained again by
    one rank, from the shards in the checkpoint before, and nothing of the others' is left."""
    allocation = site.start(train=SHARDED, program=SLOW)
    first = site.done(site.order(allocation, 0, kind="initialize"))
    assert first.weights == "weights.json"
    start = site.spool.order("run-a-000000").path / "weights.json"
    one = site.order(allocation, 1, kind="train", steps=4, start=start)
    result = site.done(one)
    manifest = one.path / "weights.json"
    assert result.sha256 == hashlib.sha256(manifest.read_bytes()).hexdigest()
    (saved,) = site.spool.checkpoints.iterdir()
    assert all(path.samefile(saved / path.name) for path in files_of(manifest))

    (allocation.path / "slow").touch()
    two = site.order(allocation, 2, kind="train", steps=4, start=manifest)
    site.wait((two.path / "weights.json").exists)
    expected = read_back(two.path / "weights.json")
    site.processes[0][1].kill()
    site.ended()
    assert two.result() is None
    allocation.mark_job_ended()

    again = site.start(ranks=1, train=dataclasses.replace(SHARDED, micro_batch=4))
    again.assign(two.id)
    assert site.done(two).weights == "weights.safetensors"
    found = read_back(two.weights)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=5e-4, err_msg=name)
    assert weight_files(two.path) == ["weights.safetensors"]


def weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("weights*"))
