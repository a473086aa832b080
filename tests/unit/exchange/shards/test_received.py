"""Replies in shards at the server: what stays open, in memory and on the disk."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from worlds.exchange.federation import Federation, trained
from worlds.exchange.shards import even_cuts, write_shards

from flwr_hpc.exchange.checkpoint import FileCheckpoints
from flwr_hpc.exchange.executors import in_threads
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.shards.cuts import OPEN
from flwr_hpc.exchange.shards.manifest import (
    MAX_TEXT,
    Manifest,
    Shard,
    WeightFiles,
    files_of,
    remove_others,
)
from flwr_hpc.exchange.store import PREFIX
from flwr_hpc.exchange.tensors import BadPayload, TensorInfo
from strategies.parts import blocks
from strategies.parts.rules import record_mean

KEY = f"{PREFIX}arrays"
SHARDS = 64


def initial():
    return ArrayRecord(
        {"w": Array(np.linspace(1, 2, SHARDS * 500, dtype="f4").reshape(SHARDS, -1))}
    )


@pytest.fixture
def federation(tmp_path):
    def cut(node, path, content):
        whole = WeightFiles.open(path).whole
        cuts = even_cuts(whole.layout, SHARDS)
        return write_shards(path.with_name("trained.safetensors"), whole, cuts)[0]

    return Federation(tmp_path, spoil=cut)


def open_files():
    return len(os.listdir("/proc/self/fd"))


class Watched:
    """Blocks, and how many files are open at each."""

    def __init__(self, made):
        self.made, self.shape, self.dtype, self.open = made, made.shape, made.dtype, []

    def __iter__(self):
        for block in self.made:
            self.open.append(open_files())
            yield block


@pytest.mark.parametrize("codec", ["full", "bf16"])
def test_shards_are_closed_until_they_are_read(tmp_path, federation, monkeypatch, codec):
    """Protects a run of many sites and ranks from the limit of open files: 1024 by default."""
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    before = open_files()
    replies = federation.train(11, 12, arrays=initial())
    assert open_files() - before < 10
    records = [reply.content["arrays"] for reply in replies]
    ((name, mean),) = record_mean(records, [1, 1])
    watched = Watched(mean)
    found = FileCheckpoints(tmp_path / "kept").put("mean", [(name, watched)])
    assert max(watched.open) - before < 10 + len(records) * OPEN < SHARDS
    expected = np.mean([record["w"].numpy() for record in records], axis=0)
    np.testing.assert_allclose(found["w"].numpy(), expected, rtol=1e-6)


def spoil(federation, change):
    """Have a site's last shard changed in the store: its bytes, or None to remove it."""
    send = federation.site.exchange.send

    def sent(content, key, *args, **options):
        metrics = send(content, key, *args, **options)
        manifest = json.loads(content[KEY]["manifest"])
        last = manifest["shards"][-1]
        path = next(federation.folder.glob(f"store/node-*/{last['sha256']}.payload"))
        data = path.read_bytes()
        path.unlink()
        if (data := change(data)) is not None:
            last["sha256"], last["bytes"] = hashlib.sha256(data).hexdigest(), len(data)
            path.with_name(f"{last['sha256']}.payload").write_bytes(data)
        content[KEY] = ConfigRecord({**content[KEY], "manifest": json.dumps(manifest)})
        return metrics

    object.__setattr__(federation.site.exchange, "send", sent)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: None, "is not in the store"),
        (lambda data: data[:-4] + b"\xff\xff\xff\x7f", "not finite"),
        (lambda data: data[:-1], "not a valid safetensors file"),
    ],
    ids=["missing", "not finite", "short"],
)
def test_a_refused_reply_leaves_no_shard(federation, change, says):
    """Protects the server's disk: all go at once, in its folder and in the store."""
    spoil(federation, change)
    gc.disable()
    try:
        (reply,) = federation.train(11, arrays=initial())
        left = list((federation.folder / "server").iterdir())
    finally:
        gc.enable()
    assert says in reply.error.reason
    assert len(left) == 1  # the version
    assert not list(federation.folder.glob("store/node-*/*"))


def test_shards_may_be_the_same(federation):
    """Protects what begins with zeros: one payload is all of these shards."""
    zeros = ArrayRecord({"w": Array(np.zeros((SHARDS, 500), np.float32))})
    replies = federation.train(11, 12, arrays=zeros)
    found = [reply.content["arrays"]["w"].numpy() for reply in replies]
    for node, array in zip((11, 12), found, strict=True):
        np.testing.assert_array_equal(array, trained("w", zeros["w"].numpy(), node))


def test_words_of_a_refusal_are_short_and_fit_for_a_terminal(federation):
    """Protects logs and terminals from names that a site makes up."""
    name = "\ud800\x1b[2J" + "n" * 1_000_000
    spoil(federation, lambda data: data)
    sent = federation.site.exchange.send

    def renamed(content, key, *args, **options):
        metrics = sent(content, key, *args, **options)
        text = content[KEY]["manifest"].replace('"w"', json.dumps(name))
        content[KEY] = ConfigRecord({**content[KEY], "manifest": text})
        return metrics

    object.__setattr__(federation.site.exchange, "send", renamed)
    (reply,) = federation.train(11, arrays=initial())
    assert "missing" in reply.error.reason
    ((_, fields),) = federation.events
    for words in (reply.error.reason, fields["reason"]):
        assert len(words) < 1100
        assert words.isprintable()


def test_shards_come_at_the_same_time(federation):
    """Protects the time that a large model takes: one slow shard holds up no other."""
    opened, together = federation.store.open, threading.Barrier(4, timeout=60)
    turns = iter([together.wait] * 4)

    def met(ref):
        next(turns, int)()
        return opened(ref)

    federation.store.open = met
    (reply,) = federation.train(11, arrays=initial())
    assert reply.content["arrays"]["w"].shape == (SHARDS, 500)


def test_work_in_threads_ends_with_its_first_failure():
    """Protects who waits: the others are hurried, none is begun any more."""
    hurry, begun = threading.Event(), []

    def work(i):
        begun.append(i)
        if i == 1:
            raise ValueError("first")
        assert hurry.wait(60)
        raise BadPayload("hurried")

    with pytest.raises(ValueError, match="first"):
        in_threads(work, range(100), 2, hurry.set)
    assert sorted(begun) == [0, 1]
    assert in_threads(str, range(100), 3) == [str(i) for i in range(100)]


def test_the_largest_models_of_many_ranks_have_a_manifest():
    """Protects hours of training: what 1024 ranks write of 405B can be read, and sent."""
    layout = {
        f"model.layers.{i // 9}.self_attn.part{i % 9}_proj.weight": TensorInfo("F32", (16384, 16))
        for i in range(1135)
    }
    cuts = even_cuts(layout, 1024)
    shards = [Shard("0" * 64, 1 << 30, c, f"weights-{k:05d}-of-01024") for k, c in enumerate(cuts)]
    assert len(Manifest(layout, shards).to_json()) < MAX_TEXT


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    """Protects a job from a damaged disk: it hears of bad weights, not of an encoding."""
    path = tmp_path / "weights.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(BadPayload, match="not a manifest"):
        WeightFiles.open(path)


def test_rows_of_shards_are_whole_after_a_closed_file(tmp_path):
    """Protects values: a file that was let go of gives the same ones."""
    whole = RecordTensors(initial())
    path = write_shards(tmp_path / "weights.safetensors", whole, even_cuts(whole.layout, 3))[0]
    found = WeightFiles.open(path)
    for file, _ in found.parts:
        file.let_go()
    np.testing.assert_array_equal(found.whole.raw("w"), whole.raw("w"))
    assert all(file.in_place for file, _ in found.parts)


def test_what_a_killed_job_had_begun_goes_with_what_it_left(tmp_path):
    """Protects a site's disk: drafts are as large as the model, and have names of their own."""
    whole, path = RecordTensors(initial()), tmp_path / "weights.safetensors"
    write_shards(path, whole, even_cuts(whole.layout, 2))
    for name in (path.name, "weights-00003-of-00004.safetensors", "weights.json"):
        (tmp_path / f".{name}.0a1b2c3d.tmp").write_bytes(b"d")
    others = [tmp_path / name for name in (".weights2.safetensors.0a1b2c3d.tmp", "order.json")]
    for other in others:
        other.touch()
    manifest = write_shards(path, whole, even_cuts(whole.layout, 3))[0]
    remove_others(path, manifest)
    assert set(tmp_path.iterdir()) == {*files_of(manifest), *others}
