"""Updates in fewer bytes: how many, what is refused, and what error feedback brings along."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.tensorfile import TensorFile, save
from flwr_hpc.exchange.tensors import BadPayload

ROOT = Path(__file__).parents[4]
TOPK2 = ["topk", "int2"]


def model(seed, scale=1.0, size=100_000):
    rng = np.random.default_rng(seed)
    values = scale * rng.standard_normal(size, dtype=np.float32)
    return RecordTensors(
        ArrayRecord({"w": Array(values.reshape(100, -1)), "n": Array(values[:70])})
    )


def moved(base, seed, by=0.01):
    """Weights a step away from others."""
    step = model(seed, by, base.layout["w"].size)
    sums = {n: Array(base.tensor(n) + step.tensor(n)) for n in base.layout}
    return RecordTensors(ArrayRecord(sums))


def adapters(seed, scale=1.0):
    """Of rank 8, for one layer of Llama 3.1 8B."""
    rng, tensors = np.random.default_rng(seed), {}
    for names, into, out in (("qo", 4096, 4096), ("kv", 4096, 1024), ("gu", 4096, 14336)):
        for name in names:
            tensors[f"base_model.model.model.layers.0.{name}_proj.lora_A.weight"] = (8, into)
            tensors[f"base_model.model.model.layers.0.{name}_proj.lora_B.weight"] = (out, 8)
    values = {n: scale * rng.standard_normal(s, dtype=np.float32) for n, s in tensors.items()}
    return RecordTensors(ArrayRecord({n: Array(v) for n, v in values.items()}))


@pytest.mark.parametrize(
    ("codec", "share"),
    [
        ("bf16", 0.501),
        ("int8", 0.26),
        ("int4", 0.135),
        (TOPK2, 0.01),
        (["bf16", "zstd"], 0.36),
        ([*TOPK2, "zstd"], 0.006),
    ],
)
def test_the_bytes_of_an_update(codec, share, tmp_path):
    """The shares that the documentation gives, of the bytes of float32."""
    base = model(0, size=1_000_000)
    make_codec(codec).encode(moved(base, 1), tmp_path / "payload", base)
    assert (tmp_path / "payload").stat().st_size <= share * base.nbytes


@pytest.mark.parametrize(("codec", "share"), [("int8", 0.26), ("int4", 0.135), (TOPK2, 0.01)])
def test_the_bytes_of_adapters_of_a_large_model(codec, share, tmp_path):
    """The same shares, although adapters are many small tensors."""
    base = adapters(0)
    make_codec(codec).encode(adapters(0, 1.01), tmp_path / "payload", base)
    assert (tmp_path / "payload").stat().st_size <= share * base.nbytes


def test_topk_keeps_the_largest(tmp_path):
    """Of each block; the others stay as they are in the base."""
    base = RecordTensors(ArrayRecord({"w": Array(np.zeros(5000, np.float32))}))
    new = np.linspace(-1, 1, 5000, dtype=np.float32)
    codec = make_codec("topk")
    codec.encode(RecordTensors(ArrayRecord({"w": Array(new)})), tmp_path / "p", base)
    received = codec.decode(tmp_path / "p", base).tensor("w")
    kept = np.flatnonzero(received)
    assert len(kept) == 64 + 15  # of 4096, and as large a share of 904
    np.testing.assert_array_equal(received[kept], new[kept])
    dropped = np.setdiff1d(np.arange(4096), kept)
    assert np.abs(new[kept[kept < 4096]]).min() >= np.abs(new[dropped]).max()


@pytest.mark.parametrize(
    "codec", ["bf16", "int8", "int4", "topk", TOPK2, ["topk", "int8"]], ids=str
)
def test_zstd_is_exact(codec, tmp_path):
    """It changes no bit, wherever a range begins in its frames, and takes no room of its own."""
    before = codec if isinstance(codec, list) else [codec]
    base, rng = model(0, size=700_000), random.Random(0)
    sent, found = moved(base, 1), []
    for number, stages in enumerate((before, [*before, "zstd"])):
        made, path = make_codec(stages), tmp_path / str(number)
        made.encode(sent, path, base)
        found.append(made.decode(path, base, base.layout))
    plain, compressed = (path.stat().st_size for path in sorted(tmp_path.iterdir()))
    assert compressed < plain
    readers = [tensors.reader("w") for tensors in found]
    for _ in range(20):
        part = slice(*sorted(rng.randrange(700_000) for _ in "ab"))
        np.testing.assert_array_equal(*(read(part) for read in readers))
    np.testing.assert_array_equal(*(tensors.raw("w") for tensors in found))


def test_what_zstd_does_not_make_smaller_stays_as_it_is(tmp_path):
    """Protects lines from payloads that grow: of bfloat16 the lower bytes are stored if noise."""
    count, rng = 300_000, np.random.default_rng(0)
    bits = 0x3F00 + rng.integers(0, 256, count, np.uint32) << 16
    new, base = (
        RecordTensors(ArrayRecord({"w": Array(values)}))
        for values in (bits.view(np.float32), np.zeros(count, np.float32))
    )
    make_codec(["bf16", "zstd"]).encode(new, tmp_path / "payload", base)
    assert count < TensorFile(tmp_path / "payload").raw("w").size < count + 500


@pytest.mark.parametrize(
    "codec",
    [
        ["int8", "topk"], ["topk", "full"], ["full", "int8"], [], 3, "zstd", ["zstd", "bf16"],
        ["bf16", "zstd", "zstd"], ["worlds.exchange.codecs.Half", "zstd"],
    ],
)  # fmt: skip
def test_codecs_that_do_not_go_together(codec):
    """Said before anything starts."""
    with pytest.raises(UserError, match=r"exchange\.codec.*topk"):
        make_codec(codec)


def test_zstd_of_whole_weights():
    """A refusal names the figures that were measured."""
    rows = json.loads((ROOT / "benchmarks/results/lossless.json").read_text())["rows"]
    full, bf16 = (next(row for row in rows if row["codec"] == n) for n in ("full", "bf16"))
    left = round(100 * (1 - bf16["share_left"]))
    says = rf"\[full,zstd\] .* saves {full['saved_percent']} % .* save {left} % of an update"
    with pytest.raises(UserError, match=says):
        make_codec(["full", "zstd"])


@pytest.mark.parametrize("codec", ["topk", TOPK2])
@pytest.mark.parametrize("steps", [[9, 0], [4095, 1], [1, 65535]], ids=["twice", "beyond", "back"])
def test_positions_that_are_none(codec, steps, tmp_path):
    """No value is added twice, and none beside its tensor."""
    base, made = model(0), make_codec(codec)
    made.encode(moved(base, 1), tmp_path / "p", base)
    payload = TensorFile(tmp_path / "p")
    spoilt = {n: payload.raw(n).copy() for n in payload.layout}
    spoilt["w"][:4] = np.array(steps, "<u2").view(np.uint8)
    save(RecordTensors(ArrayRecord({n: Array(a) for n, a in spoilt.items()})), tmp_path / "bad")
    with pytest.raises(BadPayload, match="steps"):
        made.decode(tmp_path / "bad", base, base.layout).tensor("w")
