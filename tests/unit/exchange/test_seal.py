"""What is hashed once is not hashed again on the same host, and nothing else goes unhashed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from flwr_hpc import files
from flwr_hpc.exchange import tensorfile, transfer
from flwr_hpc.exchange.checkpoint import FileCheckpoints
from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.expected import Expected
from flwr_hpc.exchange.publisher import Publisher
from flwr_hpc.exchange.receiver import Receiver
from flwr_hpc.exchange.store import GLOBAL, PREFIX, Reference, make_store
from flwr_hpc.exchange.tensorfile import TensorFile, sha256_of, write_safetensors, write_stream
from flwr_hpc.exchange.tensors import BadPayload, TensorInfo
from flwr_hpc.exchange.transfer import Transfer
from flwr_hpc.protocol import ARRAYS

LAYOUT = {"w": TensorInfo("F32", (512, 1024))}
SIZE = LAYOUT["w"].nbytes


def weights(path, value=1.0):
    """Write 2 MB of weights as a job does; return their sha256."""
    return write_safetensors(path, [("w", np.full((512, 1024), value, np.float32))], LAYOUT)


@pytest.fixture
def hashed(monkeypatch):
    """Count the bytes that are hashed."""
    count = Counter()

    class Counting:
        def __init__(self, data=b""):
            self.digest = hashlib.sha256(data)
            self.hexdigest = self.digest.hexdigest

        def update(self, data):
            count["bytes"] += memoryview(data).nbytes
            self.digest.update(data)

    class Hashlib:
        sha256 = Counting

        @staticmethod
        def file_digest(file, name):
            count["bytes"] += os.fstat(file.fileno()).st_size
            return hashlib.file_digest(file, name)

    for module in (tensorfile, transfer):
        monkeypatch.setattr(module, "hashlib", Hashlib)
    return count


def test_a_round_trip_hashes_what_is_written_and_nothing_twice(tmp_path, hashed):
    """A job's file and the version made of it: 2 of the 4 models that were hashed for it."""
    store, codec = make_store(str(tmp_path / "store")), make_codec("full")
    checkpoints = FileCheckpoints(tmp_path / "checkpoints")
    publisher = Publisher(store, codec, tmp_path / "server", 0.0)
    receiver = Receiver(store, codec, tmp_path / "server", publisher.version, 1 << 26)
    (tmp_path / "server").mkdir()
    trained = tmp_path / "job" / "weights.safetensors"
    sha256 = weights(trained)
    content = RecordDict()
    site = SiteExchange(store, codec, 0.0)
    site.send(content, ARRAYS, trained, sha256, node_id=7)
    reply = receiver.take(content, Expected(7, {ARRAYS: LAYOUT}), Transfer())[ARRAYS]
    version = checkpoints.put("global", [("w", reply["w"].numpy() * np.float32(2))])
    ref = publisher._publish(version, ARRAYS, _Message)
    for number in range(3):  # sites
        content = RecordDict({PREFIX + ARRAYS: ref.to_record()})
        received = site.receive(content, ARRAYS, tmp_path / f"site{number}")
        np.testing.assert_array_equal(TensorFile(received).tensor("w"), np.float32(2))
    assert 2 * SIZE <= hashed["bytes"] < 2.01 * SIZE


class _Message:
    class metadata:
        dst_node_id = 7


def test_a_version_that_was_not_foreseen_is_hashed_as_it_is_written(tmp_path, hashed):
    """FedAdam's weights come from memory: to publish them they were read once more."""
    path = tmp_path / "w"
    stored = write_stream(path, [("w", np.ones((512, 1024), np.float32))])
    assert (TensorFile(path).sha256, sha256_of(path)) == (stored, stored)
    assert hashed["bytes"] < 1.01 * SIZE
    assert hashlib.sha256(path.read_bytes()).hexdigest() == stored


def written_to(path):
    with open(path, "r+b") as f:
        f.seek(5000)
        f.write(b"x")


def written_to_and_dated_back(path):
    before = path.stat()
    with open(path, "r+b") as f:
        f.truncate(before.st_size + 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def of_another_user(path):
    os.chown(path, 65534, 65534)


def for_all_to_write(path):
    path.chmod(0o666)


def copied_without_its_note(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def after_a_crash(path):
    note = os.getxattr(path, files.SEAL).decode().split(" ")
    os.setxattr(path, files.SEAL, " ".join([*note[:-1], "another-boot"]).encode())


def with_a_note_of_nonsense(path):
    os.setxattr(path, files.SEAL, b"\xff\xfe")


DOUBTS = [
    written_to,
    written_to_and_dated_back,
    of_another_user,
    for_all_to_write,
    copied_without_its_note,
    after_a_crash,
    with_a_note_of_nonsense,
]


@pytest.mark.parametrize("doubt", DOUBTS)
def test_where_there_is_any_doubt_the_bytes_are_hashed(tmp_path, doubt):
    """What another may have changed, or a crash, is never taken for what was hashed."""
    if doubt is of_another_user and os.geteuid():
        pytest.skip("takes root")
    path = tmp_path / "w"
    sha256 = weights(path)
    with open(path, "rb") as file:
        assert files.sealed(file.fileno()) == sha256
    doubt(path)
    with open(path, "rb") as file:
        assert files.sealed(file.fileno()) == ""
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("own", [False, True])
def test_a_store_delivers_nothing_that_was_changed_after_it_was_hashed(tmp_path, own):
    """A flipped bit is found by the site, which links, and by the server, which copies."""
    store, path = make_store(str(tmp_path / "store")), tmp_path / "w"
    ref = store.put(path, GLOBAL, weights(path))
    path.chmod(0o644)
    written_to(path)
    with pytest.raises(BadPayload, match="sha256"):
        store.get(ref, tmp_path / "target", own=own)
    assert not (tmp_path / "target").exists()


def test_a_payload_under_a_name_that_is_not_its_hash_is_refused(tmp_path):
    """The note has to be of what was asked for."""
    store, path = make_store(str(tmp_path / "store")), tmp_path / "w"
    weights(path)
    for own in (False, True):
        with pytest.raises(BadPayload, match="sha256"):
            store.get(store.put(path, GLOBAL, "0" * 64), tmp_path / "target", own=own)


def test_what_changes_while_it_is_copied_is_found(tmp_path, monkeypatch):
    """The server's copy is made of what was hashed, or hashed itself."""
    store, path = make_store(str(tmp_path / "store")), tmp_path / "w"
    ref = store.put(path, "node-7", weights(path))
    path.chmod(0o644)
    real = os.sendfile

    def change(target, source, offset, count):
        written_to(path)
        return real(target, source, offset, count)

    monkeypatch.setattr("os.sendfile", change)
    with pytest.raises(BadPayload, match="sha256"):
        store.get(ref, tmp_path / "target", own=True)


def test_where_the_kernel_stops_copying_python_goes_on(tmp_path, monkeypatch):
    """A file system that knows no sendfile costs time, not the reply."""
    store, path = make_store(str(tmp_path / "store")), tmp_path / "w"
    ref = store.put(path, "node-7", weights(path))
    real, calls = os.sendfile, Counter()

    def stops(target, source, offset, count):
        calls["sendfile"] += 1
        if calls["sendfile"] > 1:
            raise OSError(22, "Invalid argument")
        return real(target, source, offset, 1000)

    monkeypatch.setattr("os.sendfile", stops)
    progress = Transfer()
    store.get(ref, tmp_path / "target", own=True, transfer=progress)
    assert (tmp_path / "target").read_bytes() == path.read_bytes()
    assert progress.done == ref.bytes


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_it_needs_no_privileges(tmp_path):
    """A user's published weights are read-only; their note was made before."""
    script = """
import os, sys, numpy as np
from pathlib import Path
from flwr_hpc import files
from flwr_hpc.exchange.store import make_store
from flwr_hpc.exchange.tensorfile import write_stream
make_store("")
os.setgid(65534), os.setuid(65534), os.chdir(sys.argv[1])
store, path = make_store("store"), Path("w").absolute()
ref = store.put(path, "global", write_stream(path, [("w", np.ones((512, 1024), np.float32))]))
store.get(ref, Path("target").absolute())
with open("target", "rb") as file:
    print(files.sealed(file.fileno()) == ref.sha256, os.access("target", os.W_OK))
"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        run = [sys.executable, "-c", script, folder]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout == "True False\n", done.stderr


def test_without_extended_attributes_all_is_as_before(tmp_path, monkeypatch):
    """NFS before Linux 5.9 has none."""

    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.setxattr", refuse)
    monkeypatch.setattr("os.getxattr", refuse)
    store, path = make_store(str(tmp_path / "store")), tmp_path / "w"
    ref = store.put(path, GLOBAL, weights(path))
    for own in (False, True):
        store.get(ref, tmp_path / "target", own=own)
    assert isinstance(ref, Reference)
    assert sha256_of(tmp_path / "target") == ref.sha256
