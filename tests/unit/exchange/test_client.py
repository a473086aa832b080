"""The site's half of the exchange."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flwr_hpc.exchange.client import receive, send
from flwr_hpc.exchange.codec import FullWeights, sha256_of
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.store import Store
from flwr_hpc.exchange.tensors import BadPayload, TensorFile

RECORD = ArrayRecord({"w": Array(np.arange(6, dtype=np.float32)), "b": Array(np.zeros(()))})


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    FullWeights().encode(RecordTensors(RECORD), path)
    return path


@pytest.mark.parametrize("inline_below_mb", [0.0, 1.0])
@pytest.mark.parametrize("into_folder", [False, True])
def test_what_one_side_sends_the_other_receives(
    store, weights, tmp_path, inline_below_mb, into_folder
):
    """Inline or by reference, the file arrives bit by bit, and again without harm."""
    content = RecordDict()
    send(content, "arrays", weights, sha256_of(weights), store, inline_below_mb, owner="a")
    assert bool(content.array_records) is (inline_below_mb > 0)
    target = tmp_path / "site"
    if into_folder:
        target.mkdir()
    for _ in range(2):
        path = receive(content, "arrays", store, target)
        assert path == (target / f"{sha256_of(weights)}.safetensors" if into_folder else target)
        assert path.read_bytes() == weights.read_bytes()


def test_no_arrays_is_no_file(store, tmp_path):
    """A message without weights is not an error."""
    assert receive(RecordDict(), "arrays", store, tmp_path / "t") is None
    assert receive(RecordDict({"arrays": ArrayRecord()}), "arrays", store, tmp_path / "t") is None


def test_an_order_sent_again_fetches_nothing_again(store, weights, tmp_path):
    """The weights may be gone from the store when the site has them already."""
    content = RecordDict()
    send(content, "arrays", weights, sha256_of(weights), store, 0, owner="a")
    path = receive(content, "arrays", store, tmp_path)
    store.sweep()
    assert receive(content, "arrays", store, tmp_path) == path
    path.unlink()
    with pytest.raises(BadPayload):
        receive(content, "arrays", store, tmp_path)


def test_the_owner_is_the_facility_of_the_status(store, weights):
    """Sites that send the same weights do not share the payload that the server deletes."""
    content = RecordDict({"status": ConfigRecord({"json": json.dumps({"facility": "jülich/1"})})})
    send(content, "arrays", weights, sha256_of(weights), store, 0)
    assert str(content["exchange.arrays"]["key"]).startswith("from-j_lich_1/")


def test_a_file_that_changed_is_not_sent_inline(store, weights):
    """What the worker wrote and hashed is what goes out."""
    with pytest.raises(BadPayload, match="sha256"):
        send(RecordDict(), "arrays", weights, "0" * 64, store)


def test_received_files_are_lazy_readable(store, weights, tmp_path):
    """The worker reads with any safetensors reader."""
    content = RecordDict({"arrays": RECORD})
    file = TensorFile(receive(content, "arrays", store, tmp_path / "t"))
    np.testing.assert_array_equal(file.tensor("w"), np.arange(6))
