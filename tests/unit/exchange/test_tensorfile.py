"""Safetensors files: exact, one tensor at a time, and never trusting what they read."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flwr_hpc.exchange.tensorfile import (
    TensorFile,
    aligned,
    sha256_of,
    write_safetensors,
    write_stream,
)
from flwr_hpc.exchange.tensors import BadPayload, TensorInfo, check

ARRAYS = {
    "flags": np.array([True, False, True]),
    "half": np.arange(5, dtype=np.float16).reshape(1, 5),
    "single": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "double": np.array(np.pi),
    "count": np.arange(3),
    "empty": np.zeros((0, 4), np.float32),
}


def layout_of(arrays):
    return {n: TensorInfo.of(a) for n, a in arrays.items()}


def write(path, arrays):
    layout = aligned(layout_of(arrays))
    return write_safetensors(path, ((n, arrays[n]) for n in layout), layout)


def raw_file(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def test_the_official_library_reads_what_we_write(tmp_path):
    """Other tools can load our files, and the returned hash is that of the file."""
    path = tmp_path / "a.safetensors"
    sha256 = write(path, ARRAYS)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.dtype == ARRAYS[name].dtype
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_stream_of_unknown_layout_gives_the_same_file(tmp_path):
    """Checkpoints need not know their tensors beforehand."""
    write(tmp_path / "known", ARRAYS)
    write_stream(tmp_path / "stream", iter(ARRAYS.items()))
    assert sha256_of(tmp_path / "known") == sha256_of(tmp_path / "stream")
    assert len(list(tmp_path.iterdir())) == 2


def test_we_read_what_the_official_library_writes(tmp_path):
    """Workers may write with safetensors.torch."""
    save_file(ARRAYS, tmp_path / "b", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "b")
    assert file.layout == layout_of(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file.tensor(name), array)
        assert file.tensor(name).shape == array.shape


def test_half_precisions_widen_exactly_and_pass_through_bit_by_bit(tmp_path):
    """bfloat16 must survive a trip through numpy, which lacks it."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    write_safetensors(tmp_path / "c", [("w", bits)], {"w": TensorInfo("BF16", (1 << 16,))})
    file = TensorFile(tmp_path / "c")
    np.testing.assert_array_equal(file.raw("w"), bits)
    wide = file.tensor("w")
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide.view(np.uint32), bits.astype(np.uint32) << 16)
    write(tmp_path / "d", ARRAYS)
    half = TensorFile(tmp_path / "d").tensor("half")
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, ARRAYS["half"])


def test_full_precision_is_mapped_and_private(tmp_path):
    """Reading copies nothing, and writing to an array does not change the file."""
    write(tmp_path / "e", {"w": np.zeros(1 << 21, np.float32)})
    file = TensorFile(tmp_path / "e")
    tracemalloc.start()
    array = file.tensor("w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    array[0] = 7
    assert file.tensor("w")[0] == 0


def test_the_open_file_outlives_its_name(tmp_path):
    """Deleting an old version does not harm who still reads it."""
    write(tmp_path / "f", ARRAYS)
    file = TensorFile(tmp_path / "f")
    (tmp_path / "f").unlink()
    np.testing.assert_array_equal(file.tensor("single"), ARRAYS["single"])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([("a", np.zeros(2, np.float32))], "'b' is missing"),
        ([("b", np.zeros(3, np.float32))], "expected 'a'"),
        ([("a", np.zeros(3, np.float32))], "expected 'a'"),
        ([("a", np.zeros(2))], "expected 'a'"),
    ],
)
def test_the_writer_refuses_other_tensors_and_leaves_nothing(tmp_path, tensors, says):
    """A half-written file is never seen under its name, nor left over."""
    layout = {"a": TensorInfo("F32", (2,)), "b": TensorInfo("F32", (3,))}
    with pytest.raises(ValueError, match=says):
        write_safetensors(tmp_path / "g", tensors, layout)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_misaligned_tensors(tmp_path):
    """Readers that map a file need aligned tensors."""
    layout = {"a": TensorInfo("U8", (1,)), "b": TensorInfo("F32", (1,))}
    with pytest.raises(ValueError, match="misaligned"):
        write_safetensors(tmp_path / "h", [], layout)
    assert list(aligned(layout)) == ["b", "a"]


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"not json", b""),
        (b"[" * 100_000, b""),
        ([], b""),
        ({"a": 3}, b""),
        ({"a": entry()}, b"1234567"),
        ({"a": entry()}, b"123456789"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"123456789012"),
        ({"a": entry(offsets=(8, 16))}, bytes(16)),
        ({"a": entry(shape=(1 << 62, 4))}, bytes(8)),
        ({"a": entry(shape=(-2,))}, bytes(8)),
        ({"a": entry(dtype="F8_E4M3", offsets=(0, 2))}, bytes(2)),
        ({"a": entry(dtype="X")}, bytes(8)),
    ],
)
def test_malformed_files_are_refused(tmp_path, header, body):
    """Whatever is wrong with a file from another site is one kind of error."""
    with pytest.raises(BadPayload):
        TensorFile(raw_file(tmp_path / "bad", header, body))


@pytest.mark.parametrize("raw", [b"", b"1234", struct.pack("<Q", 1 << 60), b"\xff" * 64])
def test_a_huge_or_cut_header_costs_no_memory(tmp_path, raw):
    """A header that claims exabytes is refused before anything is allocated."""
    (tmp_path / "bad").write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(BadPayload):
        TensorFile(tmp_path / "bad")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("cut", [1, 8, 30, 200])
def test_every_truncation_is_refused(tmp_path, cut):
    """A transfer that broke off never looks like weights."""
    write(tmp_path / "whole", ARRAYS)
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-cut])
    with pytest.raises(BadPayload):
        TensorFile(tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"single": np.full((3, 4), np.nan, np.float32)}, "'single' has a value"),
        ({"double": np.array(np.inf)}, "'double' has a value"),
        ({"half": np.full((1, 5), -np.inf, np.float16)}, "'half' has a value"),
        ({"single": np.zeros((4, 3), np.float32)}, "shape"),
        ({"count": np.zeros(3, np.int32)}, "dtype I32, expected I64"),
        ({"more": np.zeros(3)}, "unknown"),
    ],
)
def test_check_names_what_is_wrong(tmp_path, change, says):
    """Nothing of the wrong shape, dtype or value touches the model."""
    write(tmp_path / "i", ARRAYS | change)
    with pytest.raises(BadPayload, match=says):
        check(TensorFile(tmp_path / "i"), layout_of(ARRAYS))


def test_check_accepts_declared_dtypes_and_notes_missing_tensors(tmp_path):
    """A site may say that it sends half precision for full; it may not leave tensors out."""
    write(tmp_path / "j", ARRAYS | {"single": ARRAYS["single"].astype(np.float16)})
    check(TensorFile(tmp_path / "j"), layout_of(ARRAYS), ["F16"])
    for accept in ((), ["BF16"]):
        with pytest.raises(BadPayload, match="dtype F16, expected F32"):
            check(TensorFile(tmp_path / "j"), layout_of(ARRAYS), accept)
    write(tmp_path / "ints", ARRAYS | {"count": ARRAYS["count"].astype(np.float16)})
    with pytest.raises(BadPayload, match="dtype F16, expected I64"):
        check(TensorFile(tmp_path / "ints"), layout_of(ARRAYS), ["F16"])
    write(tmp_path / "k", {"count": ARRAYS["count"]})
    with pytest.raises(BadPayload, match="missing"):
        check(TensorFile(tmp_path / "k"), layout_of(ARRAYS))


@pytest.mark.parametrize(
    ("sent", "model", "value", "says"),
    [
        ("F64", "F32", 1e300, "not finite in F32"),
        ("F32", "F16", 1e5, "not finite in F16"),
        ("BF16", "F16", 1e38, "not finite in F16"),
        ("F32", "F32", 3e38, "squares of differences"),
        ("F64", "F64", 1e300, "squares of differences"),
        ("F32", "F32", 1e15, None),
        ("F64", "F64", 1e100, None),
        ("BF16", "F32", 1.0, None),
    ],
)
def test_values_must_be_finite_in_the_dtype_of_the_model(tmp_path, sent, model, value, says):
    """Neither the cast nor an outer step's arithmetic may make the next version infinite."""
    array = np.zeros(5, np.float64 if sent == "F64" else np.float32)
    array[3] = -value
    if sent == "BF16":
        array = (array.view(np.uint32) >> 16).astype(np.uint16)
    write_safetensors(tmp_path / "v", [("w", array)], {"w": TensorInfo(sent, (5,))})
    layout = {"w": TensorInfo(model, (5,))}
    if says is None:
        check(TensorFile(tmp_path / "v"), layout, [sent])
    else:
        with pytest.raises(BadPayload, match=says):
            check(TensorFile(tmp_path / "v"), layout, [sent])


def test_a_header_is_no_longer_than_the_layout_needs(tmp_path):
    """20 MB of table of contents for a tiny model would cost 300 MB to read."""
    write(tmp_path / "fits", ARRAYS)
    assert TensorFile(tmp_path / "fits", layout=layout_of(ARRAYS)).layout == layout_of(ARRAYS)
    many = {f"{i:040}": entry(shape=[0], offsets=[0, 0]) for i in range(200_000)}
    raw_file(tmp_path / "long", many)
    assert (tmp_path / "long").stat().st_size > 20_000_000
    tracemalloc.start()
    for layout in (layout_of(ARRAYS), None):
        with pytest.raises(BadPayload, match="the header claims"):
            TensorFile(tmp_path / "long", layout=layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_nan_in_bfloat16_and_beyond_the_first_chunk_is_found(tmp_path):
    """The finiteness check looks at every number, in every float dtype."""
    bits = np.zeros((1 << 20) + 3, np.uint16)
    bits[-1] = 0x7FC0
    write_safetensors(tmp_path / "l", [("w", bits)], {"w": TensorInfo("BF16", bits.shape)})
    with pytest.raises(BadPayload, match="not finite"):
        check(TensorFile(tmp_path / "l"))
