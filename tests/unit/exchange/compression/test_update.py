"""Updates in fewer bytes: how many, what is refused, and what error feedback brings along."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.tensorfile import TensorFile, save
from flwr_hpc.exchange.tensors import BadPayload

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


@pytest.mark.parametrize(
    ("codec", "share"), [("bf16", 0.501), ("int8", 0.26), ("int4", 0.135), (TOPK2, 0.01)]
)
def test_the_bytes_of_an_update(codec, share, tmp_path):
    """The shares that the documentation gives, of the bytes of float32."""
    base = model(0, size=1_000_000)
    make_codec(codec).encode(moved(base, 1), tmp_path / "payload", base)
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


@pytest.mark.parametrize("codec", [["int8", "topk"], ["topk", "full"], ["full", "int8"], [], 3])
def test_codecs_that_do_not_go_together(codec):
    """Said before anything starts."""
    with pytest.raises(UserError, match=r"exchange\.codec.*topk"):
        make_codec(codec)


@pytest.mark.parametrize("codec", ["topk", TOPK2])
@pytest.mark.parametrize("where", [[4095, 4095], [9, 3]], ids=["twice", "falling"])
def test_positions_that_are_none(codec, where, tmp_path):
    """No value is added twice, and none beside its tensor."""
    base, made = model(0), make_codec(codec)
    made.encode(moved(base, 1), tmp_path / "p", base)
    payload = TensorFile(tmp_path / "p")
    spoilt = {n: payload.raw(n).copy() for n in payload.layout}
    spoilt["w"][:4] = np.array(where, "<u2").view(np.uint8)
    save(RecordTensors(ArrayRecord({n: Array(a) for n, a in spoilt.items()})), tmp_path / "bad")
    with pytest.raises(BadPayload, match="positions"):
        made.decode(tmp_path / "bad", base, base.layout).tensor("w")
