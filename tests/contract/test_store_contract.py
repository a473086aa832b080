"""What every store must do."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from contextlib import ExitStack

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from worlds.exchange.server import ExchangeServer, write_credential
from worlds.exchange.shards import even_cuts, write_shards
from worlds.network import s3_server, sftp_server

from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.expected import Expected
from flwr_hpc.exchange.receiver import Receiver
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.resumable.download import MARK, MARKS, PART
from flwr_hpc.exchange.shards.parcel import Parcel
from flwr_hpc.exchange.store import PREFIX, Reference, make_store, store_names
from flwr_hpc.exchange.stores.fsspec import connect
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Transfer
from flwr_hpc.protocol import ARRAYS

DATA = b"weights" * 400_000


FOLDER = "node-7"  # of the site whose credential a server's store is given

# A new store needs a row here: places, as ``exchange.store`` names them and as fsspec does.
PLACES = {
    "file": [("{folder}", "{folder}"), ("file://{folder}", "{folder}")],
    "fsspec": [
        ("memory://{name}", "memory://{name}"),
        ("sftp://far{folder}", "sftp://far{folder}"),
        ("s3://bucket/{name}", "s3://bucket/{name}"),
    ],
    "https": [("{server}", "{folder}")],
    "http": [("{server}", "{folder}")],
}


sftp = pytest.fixture(scope="module")(sftp_server.serve)
s3 = pytest.fixture(scope="module")(s3_server.serve)
REAL_SERVERS = {"sftp": sftp_server, "s3": s3_server}
ROWS = [(name, i) for name in store_names() for i in range(len(PLACES[name]))]


@pytest.fixture(
    params=ROWS, ids=lambda row: f"{row[0]}{row[1]}-{PLACES[row[0]][row[1]][0].split(':')[0]}"
)
def store(request, tmp_path):
    name, i = request.param
    names, options = {"folder": tmp_path / "store", "name": uuid.uuid4().hex}, {}
    with ExitStack() as servers:
        if name in ("http", "https"):
            server = servers.enter_context(ExchangeServer(tmp_path, tls=name == "https"))
            names["server"] = server.url
            options["credential"] = write_credential(tmp_path / "credential")
        elif (scheme := PLACES[name][i][0].partition(":")[0]) in REAL_SERVERS:
            if reason := REAL_SERVERS[scheme].MISSING:
                pytest.skip(reason)
            request.getfixturevalue(scheme)
        url, place = (text.format(**names) for text in PLACES[name][i])
        made = make_store(url, **options)
        made.place, made.at_server = connect(place), make_store(place)
        yield made


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(DATA)
    return path


def spoil(store, ref, data):
    """Replace a payload behind the store's back."""
    fs, root = store.place
    fs.rm_file(f"{root}/{ref.key}")
    with fs.open(f"{root}/{ref.key}", "wb") as f:
        f.write(data)


def test_a_payload_comes_back_as_it_was(store, payload, tmp_path):
    """The bytes, the hash and the size survive."""
    ref = store.put(payload, FOLDER)
    assert ref.sha256 == hashlib.sha256(DATA).hexdigest()
    assert (ref.bytes, ref.folder) == (len(DATA), FOLDER)
    store.get(ref, tmp_path / "new" / "target")
    assert (tmp_path / "new" / "target").read_bytes() == DATA


def test_putting_and_getting_again_changes_nothing(store, payload, tmp_path):
    """An order that is sent again puts its result again."""
    assert store.put(payload, FOLDER) == store.put(payload, FOLDER)
    for _ in range(2):
        store.get(store.put(payload, FOLDER), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == DATA
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_missing_payload_is_a_bad_payload(store, payload, tmp_path):
    """Deleted is deleted, also a second time; the reader is told, and no target appears."""
    ref = store.put(payload, FOLDER)
    store.delete(ref)
    store.delete(ref)
    with pytest.raises(BadPayload, match="not in the store"):
        store.get(ref, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    assert payload.read_bytes() == DATA


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [(DATA[:-1] + b"x", "sha256"), (DATA[:-1], "bytes"), (b"", "bytes")],
)
def test_what_is_not_what_was_put_is_refused(store, payload, tmp_path, spoiled, says):
    """A flipped bit or a cut transfer never reaches the target."""
    ref = store.put(payload, FOLDER)
    spoil(store, ref, spoiled)
    with pytest.raises(BadPayload, match=says):
        store.get(ref, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_half_uploaded_payload_is_put_again(store, payload, tmp_path):
    """A killed upload does not stand in the way of the next."""
    ref = store.put(payload, FOLDER)
    spoil(store, ref, DATA[:100])
    store.get(store.put(payload, FOLDER), tmp_path / "target")


def test_what_an_earlier_download_left_is_checked_too(store, payload, tmp_path):
    """Bytes that a crash of this machine has spoilt are fetched again."""
    ref = store.put(payload, FOLDER)
    part, marks = (tmp_path / f".{ref.sha256}{suffix}" for suffix in (PART, MARKS))
    part.write_bytes(bytes(len(DATA)))
    marks.write_bytes(MARK.pack(len(DATA)))
    transfer = Transfer()
    store.get(ref, tmp_path / "target", own=True, transfer=transfer)
    assert (tmp_path / "target").read_bytes() == DATA
    assert transfer.done == len(DATA)


def test_a_reply_in_shards_arrives(store, tmp_path):
    """Each shard is a payload; once they are taken, the server has the model, the store nothing."""
    rng, codec = np.random.default_rng(0), make_codec("full")
    model = {"w": rng.standard_normal((70, 30)), "b": rng.standard_normal(17), "one": np.ones(())}
    whole = RecordTensors(ArrayRecord({name: Array(array) for name, array in model.items()}))
    shards = write_shards(tmp_path / "w.safetensors", whole, even_cuts(whole.layout, 6))
    content = RecordDict()
    for _ in range(2):  # an order that is sent again
        SiteExchange(store, codec, 0.0).send(content, ARRAYS, *shards, node_id=7)
    receiver = Receiver(store.at_server, codec, tmp_path / "server", lambda name: whole, 1 << 26)
    parcel = Parcel.from_record(content[PREFIX + ARRAYS], FOLDER)
    taken = receiver.take(content, Expected(7, {ARRAYS: whole.layout}), Transfer())
    for name, array in model.items():
        np.testing.assert_array_equal(taken[ARRAYS][name].numpy(), array)
    assert len(parcel.parts) == 6
    assert {store.at_server.size(part.ref) for part in parcel.parts} == {None}


def test_sweep_removes_payloads_and_nothing_else(store, payload):
    """A new session starts with an empty store, and leaves foreign files alone."""
    store.sweep()
    ref = store.put(payload, FOLDER)
    fs, root = store.place
    with fs.open(f"{root}/README", "wb") as f:
        f.write(b"mine")
    store.sweep()
    assert not fs.exists(f"{root}/{ref.key}")
    assert fs.exists(f"{root}/README")


def test_concurrent_puts_of_the_same_content_are_fine(store, payload, tmp_path):
    """Two sites may send the same weights at once."""
    threads = [threading.Thread(target=store.put, args=(payload, FOLDER)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.get(store.put(payload, FOLDER), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == DATA


@pytest.mark.parametrize(
    "key",
    [
        "../{}.payload",
        "a/../{}.payload",
        "/etc/{}.payload",
        "{}.payload",
        ".a/{}.payload",
        "a/{}",
        "a/b/{}.payload",
        "a/{}.payload\n",
        f"a/{'1' * 64}.payload",
    ],
)
def test_a_reference_cannot_leave_the_store(key):
    """Keys come from other sites, and name what is in the payload."""
    with pytest.raises(BadPayload):
        Reference(key.format("0" * 64), "0" * 64, 1)


def test_a_reference_survives_its_record_and_nothing_else_passes():
    """What a message carries is checked field by field."""
    ref = Reference(f"a/{'0' * 64}.payload", "0" * 64, 5)
    assert Reference.from_record(ref.to_record()) == ref
    record = ref.to_record()
    record["bytes"] = "many"
    for wrong in (None, record):
        with pytest.raises(BadPayload):
            Reference.from_record(wrong)


def test_local_payloads_are_linked_and_not_copied(payload, tmp_path):
    """On a shared file system a model of many gigabytes is moved in no time."""
    store = make_store(str(tmp_path / "store"))
    store.get(store.put(payload), tmp_path / "target")
    assert (tmp_path / "target").stat().st_ino == payload.stat().st_ino


def test_without_hard_links_payloads_are_copied(payload, tmp_path, monkeypatch):
    """Some file systems have none."""

    def refuse(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    store = make_store(str(tmp_path / "store"))
    store.get(store.put(payload), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == DATA
    assert (tmp_path / "target").stat().st_ino != payload.stat().st_ino


def test_a_folder_of_another_user_is_not_used(payload, tmp_path):
    """What is published there would be theirs to replace."""
    store = make_store(str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "store" / "global").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="belongs to"):
        store.put(payload, "global")
    assert list((tmp_path / "theirs").iterdir()) == []
    if os.geteuid() == 0:
        (tmp_path / "store" / "shared").mkdir()
        os.chown(tmp_path / "store" / "shared", 65534, 65534)
        with pytest.raises(PermissionError, match="65534"):
            store.put(payload)


def test_sweep_and_delete_follow_no_link(payload, tmp_path):
    """A site's link to another run's store must not have its payloads deleted."""
    ours, theirs = (make_store(str(tmp_path / name)) for name in ("ours", "theirs"))
    ref = theirs.put(payload, "node-7")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "node-7").symlink_to(tmp_path / "theirs" / "node-7")
    ours.sweep()
    ours.delete(ref)
    assert ours.size(ref) is None
    assert theirs.size(ref) == ref.bytes


def test_a_full_disk_is_an_os_error_and_leaves_nothing(payload, tmp_path, monkeypatch):
    """No space is not the payload's fault."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    store = make_store(f"memory://{uuid.uuid4().hex}")
    ref = store.put(payload)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        store.get(ref, tmp_path / "new" / "target")
    assert not isinstance(caught.value, BadPayload)
    assert list((tmp_path / "new").iterdir()) == []
