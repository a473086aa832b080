"""What every codec must do: those that are there, and two of a newcomer."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from worlds.exchange.memory import Model
from worlds.exchange.shards import even_cuts

from flwr_hpc.exchange.codec import codec_names, make_codec
from flwr_hpc.exchange.compression import update
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.shards.cuts import Joined, Sliced, slice_layout
from flwr_hpc.exchange.tensorfile import TensorFile, save, sha256_of
from flwr_hpc.exchange.tensors import BadPayload, TensorInfo, check

ALONE = [name for name in codec_names() if name != "zstd"]
COMPRESSED = [["bf16", "zstd"], ["int4", "zstd"], ["topk", "zstd"], ["topk", "int2", "zstd"]]
COMPOSED = [["topk", "int2"], ["topk", "int8"], *COMPRESSED]
PACKING = [name for name in ALONE if make_codec(name).relative]


@pytest.fixture(
    params=[*ALONE, *COMPOSED, "worlds.exchange.codecs.Half", "worlds.exchange.codecs.Xor"],
    ids=str,
)
def codec(request):
    return make_codec(request.param)


@pytest.fixture(params=[True, False], ids=["base", "alone"])
def base(request):
    """A version that both sides have, or none."""
    return tensors(0) if request.param else None


def tensors(seed):
    rng = np.random.default_rng(seed)
    return RecordTensors(
        ArrayRecord(
            {
                "w": Array(rng.standard_normal((40, 30), dtype=np.float32)),
                "b": Array(rng.standard_normal(30)),
                "scale": Array(np.asarray(rng.standard_normal(), dtype=np.float32)),
                "none": Array(np.zeros((0, 3), np.float32)),
                "large": Array(rng.standard_normal(9000, dtype=np.float32)),
                "count": Array(np.arange(5)),
            }
        )
    )


def test_a_payload_decodes_to_what_was_encoded(codec, base, tmp_path):
    """Names, shapes and values survive, given the base that both sides have."""
    sent = tensors(1)
    sha256 = codec.encode(sent, tmp_path / "payload", base)
    assert sha256 == sha256_of(tmp_path / "payload")
    received = codec.decode(tmp_path / "payload", base, sent.layout)
    check(received, sent.layout, codec.dtypes)
    assert distance(received, sent) <= codec.tolerance * distance(sent, base)


def test_ranges_are_those_of_the_whole(codec, base, tmp_path):
    """Protects the server's memory: what is read in blocks, wherever they end, is the tensor."""
    sent, rng = tensors(1), random.Random(0)
    codec.encode(sent, tmp_path / "payload", base)
    received = codec.decode(tmp_path / "payload", base, sent.layout)
    for name, info in sent.layout.items():
        whole, read = received.tensor(name).reshape(-1), received.reader(name)
        for _ in range(20):
            start, stop = sorted(rng.randint(0, info.size) for _ in "ab")
            np.testing.assert_array_equal(read(slice(start, stop)), whole[start:stop])
            assert read(slice(start, stop)).dtype == whole.dtype


def test_a_large_tensor_is_never_whole_in_memory(codec, tmp_path):
    """Protects job, server and site: it is encoded, checked, read and saved in blocks."""
    if type(codec).__module__.startswith("worlds"):
        pytest.skip("a newcomer's codec need not tell ranges apart")
    count = 8_000_000
    large = {"w": TensorInfo("F32", (count,))}
    zeros, ones = (
        RecordTensors(ArrayRecord({"w": Array(np.full(count, x, np.float32))})) for x in (0, 1)
    )
    for weights, name in ((zeros, "base"), (ones, "trained")):
        save(weights, tmp_path / name)
    del zeros, ones, weights
    base, trained = TensorFile(tmp_path / "base"), TensorFile(tmp_path / "trained")
    tracemalloc.start()
    codec.encode(trained, tmp_path / "payload", base)
    received = codec.decode(tmp_path / "payload", base, large)
    check(received, large, codec.dtypes)
    save(received, tmp_path / "saved")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * 4 * count
    np.testing.assert_array_equal(TensorFile(tmp_path / "saved").raw("w"), received.raw("w"))


@pytest.mark.parametrize("stages", [*PACKING, *COMPOSED], ids=str)
def test_pieces_make_the_bytes_of_the_whole(stages, tmp_path, monkeypatch):
    """Protects what travels: it does not tell how much of a tensor a job had in memory."""
    codec, rng = make_codec(stages), np.random.default_rng(0)
    edges = [n * codec.period + k for n in (1, 2, 5) for k in (-1, 0, 1)]
    for size in sorted({n for n in edges if n > 0} | {1, *map(int, rng.integers(1, 9e4, 5))}):
        new, old = (
            RecordTensors(ArrayRecord({"w": Array(rng.standard_normal(size, dtype=np.float32))}))
            for _ in "ab"
        )
        found = set()
        for piece in (1, 3 * codec.period, 1 << 30):
            monkeypatch.setattr(update, "PIECE", piece)
            found.add(codec.encode(new, tmp_path / "payload", old))
        assert len(found) == 1, size


def distance(tensors, others):
    """The norm of the difference, or of the tensors alone."""
    differences = (
        tensors.tensor(n).astype(np.float64) - (others.tensor(n) if others else 0.0)
        for n in tensors.layout
    )
    return np.sqrt(sum(np.sum(d * d) for d in differences))


def test_a_payload_is_of_the_size_that_its_layout_implies(codec, base, tmp_path):
    """Nothing else is fetched, so what a codec writes must be within; and not much more is."""
    sent = tensors(1)
    codec.encode(sent, tmp_path / "payload", base)
    low, high = codec.size_range(sent.layout, codec.dtypes)
    assert 0 < low <= (tmp_path / "payload").stat().st_size <= high
    assert high < sent.nbytes + 10_000


def test_a_payload_may_be_a_shard(codec, base, tmp_path):
    """Rows of tensors against the same rows of the base; all shards make up what was sent."""
    sent, shards = tensors(1), []
    for cut in even_cuts(sent.layout, 3):
        there, path = base and Sliced(base, cut), tmp_path / str(len(shards))
        codec.encode(Sliced(sent, cut), path, there)
        layout = slice_layout(sent.layout, cut)
        low, high = codec.size_range(layout, codec.dtypes)
        assert low <= path.stat().st_size <= high
        shards.append((codec.decode(path, there, layout), cut))
    received = Joined(shards, sent.layout)
    check(received, sent.layout, codec.dtypes)
    assert distance(received, sent) <= codec.tolerance * distance(sent, base)


def test_a_codec_that_is_not_relative_needs_no_base(codec, tmp_path):
    """The exchange opens no base for it."""
    codec.encode(tensors(1), tmp_path / "with", tensors(0))
    codec.encode(tensors(1), tmp_path / "without")
    assert codec.relative is (sha256_of(tmp_path / "with") != sha256_of(tmp_path / "without"))


def test_encoding_is_reproducible(codec, base, tmp_path):
    """The same weights have the same name in a store."""
    first, again = (codec.encode(tensors(1), tmp_path / name, base) for name in "ab")
    assert first == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_payload_is_refused(codec, base, keep, tmp_path):
    """A malformed payload is an error of one kind, before any number is used."""
    codec.encode(tensors(1), tmp_path / "payload", base)
    (tmp_path / "cut").write_bytes((tmp_path / "payload").read_bytes()[:keep])
    with pytest.raises(BadPayload):
        check(codec.decode(tmp_path / "cut", base), tensors(0).layout)


MEMORY_GB = 0.05
# The largest tensor alone is above the limit.
SHAPES = {"embed": (16_000, 1000), "head": (4_000, 1000), "norm": (1000,)}
WITH = {
    "full": ("Flower's FedAvg", "DiLoCo", "FedBuff", "FedBackfill"),
    "int4": ("DiLoCo",),
    "bf16+zstd": ("DiLoCo",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("weights"), SHAPES)


@pytest.mark.parametrize("name", WITH)
def test_aggregation_stays_within_the_memory_it_is_given(model, name):
    """Protects the server from models and numbers of sites that it has no memory for, by each
    strategy in a process of its own."""
    codec = name.split("+")
    encoded = list(model.encode(codec))
    for strategy in WITH[name]:
        found = model.peak(strategy, codec, encoded, MEMORY_GB)
        assert found["rejected"] == 0
        assert found["moved"] > 1.001
        assert 0 < found["mb"] < 1e3 * MEMORY_GB < 4 * SHAPES["embed"][0] / 1e3, strategy
