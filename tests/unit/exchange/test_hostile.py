"""A site that means harm: what was not asked for, is another's, changes, or is no file."""

from __future__ import annotations

import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from worlds.exchange.federation import Federation, InProcess, initial, plain_site, values

from flwr_hpc.exchange.grid import REJECTED
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.store import PREFIX, Reference
from flwr_hpc.exchange.tensorfile import save
from flwr_hpc.protocol import ORDER, Order, to_json

# --- what was not asked for -------------------------------------------------------------------


def hostile(federation, change, node=12):
    """Have a node change its replies to "train"."""

    def site(message):
        content = federation.site(message)
        if message.metadata.dst_node_id == node and message.metadata.message_type == "train":
            change(content)
        return content

    federation.inner.site = site


def small(**arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


@pytest.mark.parametrize(
    "extra",
    [
        {"further": small(w=np.zeros(3))},
        {"further": MetricRecord({"num-examples": 5, "loss": 0.1})},
        {"gradient": small(w=np.full(3, np.nan))},
        {f"{PREFIX}further": ConfigRecord({"key": "a"})},
        {f"{PREFIX}gradient": Reference.of("node-12", "0" * 64, 10**12).to_record()},
        {f"{PREFIX}further": Reference.of("global", "0" * 64, 10**12).to_record()},
    ],
    ids=["arrays", "metrics", "nan", "malformed", "huge", "global"],
)
@pytest.mark.parametrize("inline_below_mb", [0.0, 1.0])
def test_unasked_records_are_dropped(tmp_path, extra, inline_below_mb):
    """Flower's FedAvg would raise out of the round; here it counts the reply as it was asked."""
    federation = Federation(tmp_path, inline_below_mb)
    hostile(federation, lambda content: content.update(extra))
    result = federation.run(2, min_train_nodes=3)
    assert federation.grid.rejected == 0
    fair = FedAvg().start(InProcess(plain_site), initial(), 2)
    for name, array in values(fair.arrays).items():
        np.testing.assert_allclose(values(result.arrays)[name], array, rtol=1e-6)


def test_what_was_not_asked_for_is_never_opened_and_leaves_the_store(tmp_path, monkeypatch):
    """100 MB beside a tiny model cost the server nothing, and its disk nothing for long."""
    federation = Federation(tmp_path)
    path = tmp_path / "big"
    path.write_bytes(bytes(1_000_000))
    ref = federation.store.put(path, "node-12")
    hostile(federation, lambda content: content.update({f"{PREFIX}further": ref.to_record()}))
    opened = watch_opens(federation, monkeypatch)
    replies = federation.train(11, 12)
    assert all(reply.has_content() for reply in replies)
    assert len(opened) == 2
    assert ref.key not in opened
    assert federation.store.size(ref) is None


def watch_opens(federation, monkeypatch):
    """Return a list of the keys that are opened from now on."""
    opened, real = [], federation.store.open
    monkeypatch.setattr(
        federation.store, "open", lambda ref: opened.append(ref.key) or real(ref), raising=False
    )
    return opened


@pytest.mark.parametrize("kind", ["evaluate", "query.describe", "query.acquire"])
def test_who_was_not_asked_for_weights_sends_none(tmp_path, kind, monkeypatch):
    """An evaluation's reply, and a status, hold no arrays whatever the site says."""
    federation = Federation(tmp_path)
    path = tmp_path / "weights"
    save(RecordTensors(initial()), path)
    ref = federation.store.put(path, "node-11")
    content = {"arrays": initial(), f"{PREFIX}arrays": ref.to_record()}
    federation.inner.site = lambda message: RecordDict(content)
    opened = watch_opens(federation, monkeypatch)
    order = Order("run", "a", 1, "evaluate") if kind == "evaluate" else None
    asked = {ORDER: ConfigRecord({"json": to_json(order)})} if order else {}
    (reply,) = federation.grid.send_and_receive([Message(RecordDict(asked), 11, kind)])
    assert not reply.content.array_records
    assert not opened


@pytest.mark.parametrize("size", [99, 10**9])
def test_a_size_that_is_not_the_layouts_is_not_fetched(tmp_path, size, monkeypatch):
    """Neither as announced nor as it lies there."""
    federation = Federation(tmp_path)
    path = tmp_path / "other"
    with open(path, "wb") as f:
        f.truncate(size)

    def lie(content):
        ref = federation.store.put(path, "node-12", "0" * 64)
        content[f"{PREFIX}arrays"] = ref.to_record()

    hostile(federation, lie)
    opened = watch_opens(federation, monkeypatch)
    good, bad = federation.train(11, 12)
    assert good.has_content()
    assert "bytes, expected" in bad.error.reason
    assert len(opened) == 1


def test_a_size_that_is_not_as_announced_is_not_fetched(tmp_path, monkeypatch):
    """What lies there has another size than the reference says."""
    federation = Federation(tmp_path)
    hostile(federation, lambda content: content[f"{PREFIX}arrays"].update({"bytes": 400}))
    opened = watch_opens(federation, monkeypatch)
    (bad,) = federation.train(12)
    assert "expected 400" in bad.error.reason
    assert not opened


# --- whose payload it is ----------------------------------------------------------------------


def test_a_payload_belongs_to_the_node_that_sent_it(tmp_path):
    """12 names 11's payload and is refused; 11's own is taken afterwards."""
    federation = Federation(tmp_path)
    honest = federation.site(message_to(federation, 11))

    def steal(content):
        content[f"{PREFIX}arrays"] = honest[f"{PREFIX}arrays"]

    hostile(federation, steal)
    (thief,) = federation.train(12)
    assert thief.error.code == REJECTED
    assert "another's" in thief.error.reason
    federation.inner.site = lambda message: honest
    (owner,) = federation.train(11)
    assert owner.has_content()


def test_a_link_to_another_sites_folder_is_not_followed(tmp_path):
    """Its own name for 11's folder would let 12 have 11's payload deleted."""
    federation = Federation(tmp_path)
    honest = federation.site(message_to(federation, 11))
    os.symlink(tmp_path / "store" / "node-11", tmp_path / "store" / "node-12")

    def steal(message):
        ref = Reference.from_record(honest[f"{PREFIX}arrays"])
        mine = Reference.of("node-12", ref.sha256, ref.bytes)
        return RecordDict({f"{PREFIX}arrays": mine.to_record()})

    federation.inner.site = steal
    (thief,) = federation.train(12)
    assert thief.error.code == REJECTED
    federation.inner.site = lambda message: honest
    (owner,) = federation.train(11)
    assert owner.has_content()


def message_to(federation, node):
    """Return the message that a node gets, and take it back from the SuperLink."""
    federation.inner.site = lambda message: RecordDict()
    federation.train(node)
    return federation.inner.pushed[-1]


def test_a_reply_answers_what_it_was_pulled_for(tmp_path):
    """What a message says of its sender is the sender's own word."""
    federation = Federation(tmp_path)
    pull = federation.inner.pull_messages

    def forged(ids):
        replies = pull(ids)
        for reply in replies:
            reply.metadata.__dict__["_src_node_id"] = 11
            reply.metadata.__dict__["_reply_to_message_id"] = "another"
        return replies

    federation.inner.pull_messages = forged
    (reply,) = federation.train(12)
    assert reply.has_content()
    assert reply.metadata.src_node_id == 12
    sent = federation.inner.pushed[0].metadata.message_id
    assert reply.metadata.reply_to_message_id == sent


# --- between the check and the use --------------------------------------------------------------


def test_a_payload_that_changes_after_the_check_does_no_harm(tmp_path):
    """The server reads its own copy: not the inode that the site has a name, or a handle, for."""
    federation = Federation(tmp_path)
    trained = tmp_path / "sites" / "site12" / "trained"
    (reply,) = federation.train(12)
    expected = values(reply.content["arrays"])
    trained.chmod(0o644)
    with open(trained, "r+b") as f:
        f.write(b"\xff" * trained.stat().st_size)
    for name, array in values(reply.content["arrays"]).items():
        np.testing.assert_array_equal(array, expected[name])


def test_what_is_published_is_read_only(tmp_path):
    """A site's stray write must not reach the version that others fetch, nor its checkpoint."""
    federation = Federation(tmp_path)
    federation.train(11)
    (published,) = (tmp_path / "store" / "global").iterdir()
    assert published.stat().st_mode & 0o222 == 0


# --- regular files only -------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def to_a_device(path):
    path.symlink_to("/dev/zero")


def to_a_file(path):
    path.symlink_to(path.with_name("honest"))


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [fifo, to_a_device, to_a_file, folder])
@pytest.mark.parametrize("deceive", [False, True], ids=["found", "appears"])
def test_only_a_regular_file_is_a_payload(tmp_path, make, deceive, monkeypatch):
    """A pipe would be waited for, a device read without end; also if it comes after the look."""
    federation = Federation(tmp_path)

    def replace(content):
        ref = content[f"{PREFIX}arrays"]
        path = tmp_path / "store" / str(ref["key"])
        path.rename(path.with_name("honest"))
        make(path)
        if deceive:
            monkeypatch.setattr(federation.store, "size", lambda other: ref["bytes"])

    hostile(federation, replace)
    good, bad = federation.train(11, 12)
    assert good.has_content() or deceive
    assert bad.error.code == REJECTED


def test_no_byte_beyond_what_was_announced_is_read(tmp_path, monkeypatch):
    """A file that grows while it is fetched costs no more than the announced one."""
    federation = Federation(tmp_path)
    size = federation.store.size

    def growing(ref):
        found = size(ref)
        path = tmp_path / "store" / ref.key
        if ref.folder == "node-12" and found == ref.bytes:
            path.chmod(0o644)
            os.truncate(path, 50_000_000)
        return found

    monkeypatch.setattr(federation.store, "size", growing)
    (bad,) = federation.train(12)
    assert "more than" in bad.error.reason
    assert sum(path.stat().st_size for path in federation.files("server")) < 10_000
