"""Real workers whose ranks each write their own part of the weights."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from worlds.exchange.decoding import decoded
from worlds.train.torch_ranks import read_back
from worlds.train.worker_site import FAST, SLOW, Site

from flwr_hpc.exchange.shards.manifest import WeightFiles
from flwr_hpc.exchange.tensorfile import save
from flwr_hpc.spool import OrderDir

CODEC = ["topk", "int2"]
SHARDED = dataclasses.replace(FAST, shards_above_mb=0.0)


def test_shards_survive_a_kill_and_a_change_of_ranks(site: Site) -> None:
    """kill -9 when the shards are written and the checkpoint is not: the order is trained again by
    one rank, from the shards of the order before, and nothing of the others' is left."""
    allocation = site.start(train=SHARDED, program=SLOW)
    first = site.done(site.order(allocation, 0, kind="initialize"))
    assert first.weights == "weights.json"
    start = site.spool.order("run-a-000000").path / "weights.json"
    one = site.order(allocation, 1, kind="train", steps=4, start=start)
    result = site.done(one)
    manifest = one.path / "weights.json"
    assert result.sha256 == hashlib.sha256(manifest.read_bytes()).hexdigest()

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


@pytest.mark.parametrize("shards_above_mb", [0.0, 256.0], ids=["shards", "one file"])
def test_updates_survive_a_kill_and_a_change_of_ranks(site: Site, shards_above_mb: float) -> None:
    """kill -9 when an update is encoded and its result is not published: another number of ranks
    encodes the order again with the error that it was given before, and nothing is lost."""
    train = dataclasses.replace(FAST, shards_above_mb=shards_above_mb)
    codec = {"codec": CODEC, "feedback": 1.0}
    allocation = site.start(train=train, program=SLOW, **codec)
    first = site.done(site.order(allocation, 0, kind="initialize"))
    begun = site.spool.order("run-a-000000").path / str(first.weights)
    start = site.spool.weights("0" * 64)
    start.parent.mkdir()
    save(WeightFiles.open(begun).whole, start)
    one = site.order(allocation, 1, kind="train", steps=4, start=start)
    result = site.done(one)
    assert result.weights == "weights.json"
    assert 0.005 < result.metrics["sent_share"] < 0.1
    assert 0 < result.metrics["codec_error"] < 1

    (allocation.path / "slow").touch()
    two = site.order(allocation, 2, kind="train", steps=4, start=start)
    site.wait((two.path / "weights.json").exists)
    expected = total(site, two, start)
    site.processes[0][1].kill()
    site.ended()
    assert two.result() is None
    allocation.mark_job_ended()

    again = site.start(ranks=1, train=dataclasses.replace(train, micro_batch=4), **codec)
    again.assign(two.id)
    site.done(two)
    found = total(site, two, start)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=5e-4, err_msg=name)
    assert weight_files(two.path) == ["weights-00000-of-00001.payload", "weights.json"]


def total(site: Site, order: OrderDir, start: Path) -> dict[str, np.ndarray]:
    """Return what a site meant to send: what arrives of an order, and its error."""
    sent = decoded(CODEC, order.path / "weights.json", start)
    error = read_back(site.spool.feedback / order.id / "error.json")
    return {name: sent[name] + error[name] for name in sent}
