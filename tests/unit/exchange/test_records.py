"""Flower records whose arrays are loaded when asked for."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flwr_hpc.exchange.records import (
    LazyArray,
    RecordTensors,
    inline,
    lazy_record,
    source_of,
    tensors,
)
from flwr_hpc.exchange.tensorfile import TensorFile, save, write_safetensors
from flwr_hpc.exchange.tensors import BadPayload, TensorInfo

ARRAYS = {
    "w": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    "n": np.arange(4),
    "s": np.asarray(2.5, dtype=np.float32),
}


@pytest.fixture
def file(tmp_path):
    record = ArrayRecord({n: Array(a) for n, a in ARRAYS.items()})
    save(RecordTensors(record), tmp_path / "f")
    return TensorFile(tmp_path / "f")


def test_a_lazy_array_is_indistinguishable_from_a_plain_one(file):
    """Whatever Flower does with an array, it gets the same: values, bytes, object id."""
    for name, lazy in lazy_record(file).items():
        plain = Array(ARRAYS[name])
        np.testing.assert_array_equal(lazy.numpy(), plain.numpy())
        assert (lazy.dtype, lazy.shape, lazy.stype) == (plain.dtype, plain.shape, plain.stype)
        assert lazy.data == plain.data
        assert lazy.deflate() == plain.deflate()
        assert lazy.object_id == plain.object_id
        assert lazy.children.keys() == plain.children.keys()


def test_a_lazy_array_keeps_nothing(file):
    """Reading sizes or logging a record must not load the model for good."""
    record = lazy_record(file)
    before = {name: set(vars(array)) for name, array in record.items()}
    assert record.count_bytes() > 0
    record["w"].slice_array()
    assert len(repr(record)) < 300
    assert {name: set(vars(array)) for name, array in record.items()} == before


def test_a_lazy_array_is_immutable_and_copies_itself(file):
    """The file behind it has a hash; a changed array would be a lie."""
    lazy = lazy_record(file)["w"]
    with pytest.raises(AttributeError):
        lazy.data = b""
    assert copy.deepcopy(lazy) is lazy


def test_a_lazy_record_knows_what_it_stands_for(file):
    """Only an untouched record may be published without being written again."""
    record = lazy_record(file)
    assert source_of(record) is file
    record["w"] = Array(ARRAYS["w"])
    assert source_of(record) is None
    swapped = lazy_record(file)
    swapped["w"] = LazyArray(file, "s")
    assert source_of(swapped) is None
    fewer = lazy_record(file)
    del fewer["w"]
    assert source_of(fewer) is None
    assert source_of(ArrayRecord()) is None


def test_names_set_the_order(file):
    """Who turns a record into a list of arrays relies on its order."""
    assert list(lazy_record(file, ["n", "s", "w"])) == ["n", "s", "w"]
    assert [name for name, _ in tensors(lazy_record(file, ["s", "n", "w"]))] == ["s", "n", "w"]


def test_bfloat16_survives_inline_bit_by_bit(tmp_path):
    """numpy has no bfloat16 and Flower's Array refuses it; it arrives as bfloat16 still."""
    bits = np.array([0x3F80, 0x4049, 0x8000, 0x7F7F], np.uint16)
    write_safetensors(tmp_path / "a", [("w", bits)], {"w": TensorInfo("BF16", (4,))})
    record = inline(TensorFile(tmp_path / "a"))
    sent = {name: Array(a.dtype, a.shape, a.stype, a.data) for name, a in record.items()}
    received = RecordTensors(ArrayRecord(sent))
    np.testing.assert_array_equal(received.raw("w"), bits)
    assert received.tensor("w").tolist() == [1.0, 3.140625, -0.0, 3.3895313892515355e38]
    save(received, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    save(RecordTensors(lazy_record(TensorFile(tmp_path / "a"))), tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (2,), "numpy.ndarray", b"garbage"),
        Array("float32", (2,), "numpy.ndarray", npy(np.zeros(2, np.float32))[:-1]),
        Array("float32", (2,), "numpy.ndarray", npy(np.zeros(3, np.float32))),
        Array("float32", (2,), "numpy.ndarray", npy(np.zeros(2))),
        Array("float32", (2,), "pickle", b""),
        Array("bfloat16", (2,), "safetensors", b"123"),
        Array("float99", (2,), "numpy.ndarray", b""),
        Array("complex64", (2,), "numpy.ndarray", npy(np.zeros(2, np.complex64))),
        Array("object", (2,), "numpy.ndarray", b"\x80\x04N."),
    ],
)
def test_inline_garbage_is_a_bad_payload(array):
    """Arrays inside a message come from other sites too."""
    with pytest.raises(BadPayload):
        RecordTensors(ArrayRecord({"w": array})).raw("w")
