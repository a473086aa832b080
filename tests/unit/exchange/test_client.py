"""The site's half of the exchange."""

from __future__ import annotations

import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.store import make_store
from flwr_hpc.exchange.tensorfile import TensorFile, save, sha256_of
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.spool.folders import received_ns

RECORD = ArrayRecord({"w": Array(np.arange(6, dtype=np.float32)), "b": Array(np.zeros(()))})


@pytest.fixture
def store(tmp_path):
    return make_store(str(tmp_path / "store"))


def exchange(store, inline_below_mb=1.0):
    return SiteExchange(store, make_codec("full"), inline_below_mb)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    save(RecordTensors(RECORD), path)
    return path


@pytest.mark.parametrize("inline_below_mb", [0.0, 1.0])
def test_what_one_side_sends_the_other_receives(store, weights, tmp_path, inline_below_mb):
    """Inline or by reference, the file arrives bit by bit, and again without harm."""
    content, site = RecordDict(), exchange(store, inline_below_mb)
    site.send(content, "arrays", weights, sha256_of(weights), node_id=7)
    assert bool(content.array_records) is (inline_below_mb > 0)
    for _ in range(2):
        path = site.receive(content, "arrays", tmp_path / "site")
        assert sha256_of(weights) in path.name
        assert path.read_bytes() == weights.read_bytes()
        assert [p.name for p in (tmp_path / "site").glob("*.safetensors")] == [path.name]


def test_no_arrays_is_no_file(store, tmp_path):
    """A message without weights is not an error."""
    assert exchange(store).receive(RecordDict(), "arrays", tmp_path) is None
    content = RecordDict({"arrays": ArrayRecord()})
    assert exchange(store).receive(content, "arrays", tmp_path) is None


def test_an_order_sent_again_fetches_nothing_again(store, weights, tmp_path):
    """The weights may be gone from the store when the site has them already."""
    content, site = RecordDict(), exchange(store, 0.0)
    site.send(content, "arrays", weights, sha256_of(weights), node_id=7)
    path = site.receive(content, "arrays", tmp_path)
    store.sweep()
    assert site.receive(content, "arrays", tmp_path) == path
    path.unlink()
    with pytest.raises(BadPayload):
        site.receive(content, "arrays", tmp_path)


def test_what_is_received_is_new_where_it_is_a_link_to_an_old_file(store, weights, tmp_path):
    """Its order is about to be written: by its age it would be pruned before."""
    content, site = RecordDict(), exchange(store, 0.0)
    os.utime(weights, (0, 0))
    site.send(content, "arrays", weights, sha256_of(weights), node_id=7)
    path = site.receive(content, "arrays", tmp_path / "site")
    assert received_ns(path) > path.stat().st_mtime_ns


def test_a_payload_lies_in_the_folder_of_its_node(store, weights):
    """Sites that send the same weights do not share the payload that the server deletes."""
    keys = []
    for node_id in (7, 2**63 + 1):
        content = RecordDict()
        exchange(store, 0.0).send(content, "arrays", weights, sha256_of(weights), node_id)
        keys.append(str(content["exchange.arrays"]["key"]).partition("/")[0])
    assert keys == ["node-7", f"node-{2**63 + 1}"]


def test_a_file_that_changed_is_not_sent_inline(store, weights):
    """What the worker wrote and hashed is what goes out."""
    with pytest.raises(BadPayload, match="sha256"):
        exchange(store).send(RecordDict(), "arrays", weights, "0" * 64, 7)


def test_received_files_are_lazy_readable(store, weights, tmp_path):
    """The worker reads with any safetensors reader."""
    content = RecordDict({"arrays": RECORD})
    file = TensorFile(exchange(store).receive(content, "arrays", tmp_path))
    np.testing.assert_array_equal(file.tensor("w"), np.arange(6))
