"""Weights in shards: cut, put together, sent as they are, and refused unless they are the whole."""

from __future__ import annotations

import json
import random
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from worlds.exchange.federation import Federation, values
from worlds.exchange.shards import even_cuts, random_cuts, write_shards

from flwr_hpc.exchange.checkpoint import FileCheckpoints
from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.records import RecordTensors, lazy_record
from flwr_hpc.exchange.shards.cuts import Joined, Sliced, check_cuts
from flwr_hpc.exchange.shards.manifest import MAX_SHARDS, Manifest, Shard, WeightFiles
from flwr_hpc.exchange.store import make_store
from flwr_hpc.exchange.tensors import BadPayload, TensorInfo
from strategies.parts import blocks
from strategies.parts.rules import record_mean


def model(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return RecordTensors(
        ArrayRecord(
            {
                "w": Array(rng.standard_normal((70, 30)).astype(dtype)),
                "b": Array(rng.standard_normal(17).astype(dtype)),
                "scale": Array(np.asarray(0.5, dtype)),
                "none": Array(np.zeros((0, 3), dtype)),
            }
        )
    )


def assert_same(found, expected):
    assert list(found.layout) == list(expected.layout)
    for name in expected.layout:
        np.testing.assert_array_equal(found.raw(name), expected.raw(name), err_msg=name)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_cut_is_put_together_again(seed, tmp_path):
    """Protects every row, wherever it was cut, and any range of rows of the whole."""
    rng, whole = random.Random(seed), model(seed)
    cuts = random_cuts(whole.layout, 5, rng)
    found = WeightFiles.open(*write_shards(tmp_path / "weights.safetensors", whole, cuts)).whole
    assert_same(found, whole)
    for _ in range(20):
        start, stop = sorted(rng.randint(0, 70) for _ in "ab")
        np.testing.assert_array_equal(found.rows("w", start, stop), whole.raw("w")[start:stop])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("seed", range(5))
def test_ranges_of_numbers_are_read_across_shards(seed, dtype):
    """Protects the server's blocks, which end where no row does: the numbers are the whole's."""
    rng, whole = random.Random(seed), model(dtype=dtype)
    cuts = random_cuts(whole.layout, 5, rng)
    found = Joined([(Sliced(whole, cut), cut) for cut in cuts], whole.layout)
    for name in whole.layout:
        flat, read = whole.tensor(name).reshape(-1), found.reader(name)
        for _ in range(30):
            start, stop = sorted(rng.randint(0, flat.size) for _ in "ab")
            np.testing.assert_array_equal(read(slice(start, stop)), flat[start:stop])
            assert read(slice(start, stop)).dtype == flat.dtype


def test_a_mean_of_replies_in_shards_needs_no_whole_tensor(tmp_path, monkeypatch):
    """Protects the server's memory: of a tensor in many shards it reads a block at a time."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 14)
    rows = 2000
    whole = RecordTensors(ArrayRecord({"w": Array(np.ones((rows, 1000), np.float32))}))
    shards = write_shards(tmp_path / "weights.safetensors", whole, even_cuts(whole.layout, 8))
    replies = [lazy_record(WeightFiles.open(*shards).whole) for _ in range(3)]
    del whole
    tracemalloc.start()
    record = FileCheckpoints(tmp_path / "kept").put("mean", record_mean(replies, [1, 1, 1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.0 * 1000 * rows
    assert record["w"].numpy()[-1, -1] == 1.0


def test_a_tensor_in_one_shard_is_not_copied():
    """Protects memory: it is the shard's own array; and rows are read of no other shard."""
    whole = model()
    cuts = [{"w": (0, 40)}, {"w": (40, 70), "b": (0, 17), "scale": (0, 1)}]
    found = Joined([(Sliced(whole, cut), cut) for cut in cuts], whole.layout)
    assert np.shares_memory(found.raw("b"), whole.raw("b"))
    assert np.shares_memory(found.rows("w", 41, 60), whole.raw("w"))


def test_half_precision_stays_in_shards(tmp_path):
    """The dtype is that of the shards; unlike ones are refused."""
    whole, half = model(), model(dtype=np.float16)
    cuts = even_cuts(whole.layout, 2)
    found = Joined([(Sliced(half, cut), cut) for cut in cuts], whole.layout)
    assert {found.layout[name].dtype for name in ("w", "b", "scale")} == {"F16"}
    mixed = [(Sliced(t, cut), cut) for t, cut in zip((whole, half), cuts, strict=True)]
    with pytest.raises(BadPayload, match="'w' are F16 and F32"):
        Joined(mixed, whole.layout)


class Sharded(Federation):
    """Sites answer with shards, one more at each round: the world size changes."""

    def __init__(self, *args, **options):
        super().__init__(*args, spoil=self._cut, **options)
        self.answers = 0

    def _cut(self, node, path, content):
        self.answers += 1
        whole = WeightFiles.open(path).whole
        cuts = even_cuts(whole.layout, 1 + self.answers % 4)
        return write_shards(path.with_name("trained.safetensors"), whole, cuts)[0]


@pytest.mark.parametrize("codec", ["full", "bf16", "worlds.exchange.codecs.Xor"])
def test_shards_give_the_model_that_files_give(tmp_path, codec):
    """Protects the weights on their way: a run's result does not depend on how many wrote it."""
    federation = Sharded(tmp_path / "shards", codec=codec)
    found = federation.run(3, FedAvg)
    expected = Federation(tmp_path / "files", codec=codec).run(3, FedAvg)
    assert federation.events == []
    for name, array in values(expected.arrays).items():  # Flower's order of sites is random
        np.testing.assert_allclose(values(found.arrays)[name], array, rtol=1e-6)
    assert not list((tmp_path / "shards" / "store").glob("node-*/*"))
    del found
    assert len(federation.files("server")) <= 1


def test_a_reply_in_shards_is_lazy(tmp_path):
    """Protects the server's memory: a tensor is put together when it is asked for."""
    federation = Sharded(tmp_path)
    federation.answers = 2
    (reply,) = federation.train(11)
    source = reply.content["arrays"]["w"].source
    assert isinstance(source, Joined)
    assert len(federation.files("server")) == 1 + 4  # the version, and the shards


def exchange(folder, inline_below_mb=0.0):
    return SiteExchange(make_store(str(folder / "store")), make_codec("full"), inline_below_mb)


def test_small_shards_travel_inside_the_message(tmp_path):
    """Below the limit all of them together are one record."""
    whole, content = model(), RecordDict()
    shards = write_shards(tmp_path / "weights.safetensors", whole, even_cuts(whole.layout, 3))
    exchange(tmp_path, inline_below_mb=1.0).send(content, "arrays", *shards, 7)
    assert list(content.array_records) == ["arrays"]
    assert_same(RecordTensors(content["arrays"]), whole)


def test_a_manifest_of_another_job_is_not_sent(tmp_path):
    """Protects an order that was tried again: what the result names is what goes out."""
    path = tmp_path / "weights.safetensors"
    manifest, _ = write_shards(path, model(0), even_cuts(model().layout, 2))
    with pytest.raises(BadPayload, match="has the sha256"):
        exchange(tmp_path).send(RecordDict(), "arrays", manifest, "0" * 64, 7)


LAYOUT = {
    "a": TensorInfo("F32", (9, 4)), "b": TensorInfo("F32", (5,)), "c": TensorInfo("F32", ()),
}  # fmt: skip

SHARDS = [Shard("0" * 64, 99, cut, "w") for cut in even_cuts(LAYOUT, 3)]


def is_partition(cuts):
    """Count every row, the slow way."""
    rows = {n: [0] * (i.shape[0] if i.shape else 1) for n, i in LAYOUT.items()}
    for cut in cuts:
        for name, (start, stop) in cut.items():
            if name not in rows or not 0 <= start < stop <= len(rows[name]):
                return False
            for row in range(start, stop):
                rows[name][row] += 1
    return all(count == 1 for counts in rows.values() for count in counts)


def test_no_manifest_passes_that_is_not_a_partition():
    """Thousands of cuts with a change or two: taken exactly where each row is there once."""
    outcomes = []
    for seed in range(5000):
        rng = random.Random(seed)
        cuts = [dict(cut) for cut in random_cuts(LAYOUT, rng.randint(1, 6), rng)]
        for _ in range(rng.randrange(3)):
            cut = rng.choice(cuts)
            name = rng.choice([*cut, *LAYOUT, "d"])
            start, stop = cut.get(name, (0, 1))
            cut[name] = (start + rng.choice([0, 0, 0, 1, -1]), stop + rng.choice([0, 0, 1, 10**15]))
            if rng.random() < 0.3:
                del cut[name]
        try:
            check_cuts(cuts, LAYOUT)
            taken = True
        except BadPayload:
            taken = False
        assert taken is is_partition(cuts), (seed, cuts)
        outcomes.append(taken)
    assert 500 < sum(outcomes) < 4500


def test_what_is_read_is_what_was_written():
    """All fields survive, and a manifest says the same whoever reads it."""
    shards = [
        Shard(f"{k:064x}", 8 + k, cut, f"w-{k}") for k, cut in enumerate(even_cuts(LAYOUT, 3))
    ]
    manifest = Manifest(LAYOUT, shards, "a" * 64)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_manifest_of_any_bytes_is_read_or_refused():
    """Thousands of changed texts: nothing but BadPayload, in little memory."""
    text = Manifest(LAYOUT, SHARDS).to_json()
    odd = ["-1", "1e9", "null", "[]", "{}", '"x"', "true", "1" * 5000, "9" * 17, "[" * 3000]
    tracemalloc.start()
    for seed in range(5000):
        rng = random.Random(seed)
        at = rng.randrange(len(text))
        piece = rng.choice([*odd, chr(rng.randrange(32, 400))])
        try:
            Manifest.from_json(text[:at] + piece + text[at + rng.choice([0, 1, 4, 400]) :])
        except BadPayload:
            continue
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x" * (17 << 20), "characters, expected"),
        ('{"tensors":{},"shards":[' + "[]," * (1 << 18) + "{}]}", "lists, expected 262144 at most"),
        ('{"tensors":{"a":["F32",[' + "0," * 99 + "1]]}}", "no tensor is"),
        (json.dumps({"tensors": {}, "shards": [{}] * (MAX_SHARDS + 1)}), "4097 shards"),
        ('{"tensors":{"a":["F32",[9]]},"shards":[]}', "0 shards"),
        (json.dumps({**json.loads(Manifest(LAYOUT, SHARDS).to_json()), "base": "../w"}), "version"),
        ('{"tensors":{"a":["F32",[true]]},"shards":[{}]}', "no tensor is"),
        ('{"tensors":{},"shards":[{"sha256":"x","bytes":1,"file":"","rows":[]}]}', "no shard is"),
        (
            json.dumps(
                {
                    "tensors": {"a": ["F32", [2]]},
                    "shards": [
                        {"sha256": "0" * 64, "bytes": 8, "file": "../w", "rows": [[0, 2, [0]]]}
                    ],
                }
            ),
            "no shard is",
        ),
    ],
)
def test_a_manifest_that_could_harm_is_refused(text, says):
    """Too large, too many shards, no shards, files elsewhere."""
    with pytest.raises(BadPayload, match=says):
        Manifest.from_json(text)
