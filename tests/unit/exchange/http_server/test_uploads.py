"""Partial files of the exchange's server: offsets, quota, retention."""

from __future__ import annotations

import hashlib
import os

import pytest
from worlds.clock import FakeClock

from flwr_hpc import files
from flwr_hpc.exchange.http_server.uploads import (
    ABANDONED_S,
    SWEEP_S,
    Limits,
    Refusal,
    Uploads,
    adopt,
)
from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.stores.file import FileStore

DATA = b"weights" * 1000
DAY = 86400.0


def ref_of(data, folder="node-7"):
    return Reference.of(folder, hashlib.sha256(data).hexdigest(), len(data))


class Server:
    """One process of a server; a later one on the same folder knows its files alone."""

    def __init__(self, root, clock=None, **limits):
        self.store = FileStore(str(root))
        self.clock = clock or FakeClock(epoch=1e9)
        self.uploads = Uploads(root, self.store, Limits(**limits), self.clock)
        root.mkdir(exist_ok=True)

    def put(self, data, folder="node-7"):
        upload = self.uploads.begin(ref_of(data, folder))
        if upload:
            upload.append(upload.offset, data[upload.offset :])
            self.uploads.publish(upload)


def payloads(root):
    return sorted(p.name for p in root.rglob("*") if p.is_file())


def test_what_came_before_a_kill_is_not_sent_again(tmp_path):
    """A later process takes the rest, and checks the whole."""
    upload = Server(tmp_path).uploads.begin(ref_of(DATA))
    upload.append(0, DATA[:3000])
    later = Server(tmp_path).uploads
    upload = later.begin(ref_of(DATA))
    assert (upload.offset, later.offset("node-7", ref_of(DATA).sha256)) == (3000, 3000)
    upload.append(3000, DATA[3000:])
    later.publish(upload)
    (file,) = tmp_path.rglob("*.payload")
    assert file.read_bytes() == DATA
    assert file.stat().st_mode & 0o777 == 0o400
    assert later.begin(ref_of(DATA)) is None


def test_what_is_hashed_as_it_comes_is_not_hashed_again(tmp_path):
    """The server's own copy of a payload is made of what its gate has just checked."""
    data = bytes(files.SEALED_BYTES)
    server = Server(tmp_path)
    server.put(data)
    with server.store.open(ref_of(data)) as file:
        assert files.sealed(file.fileno()) == ref_of(data).sha256


def test_a_site_with_another_folder_goes_on_with_what_it_sent_into_the_one_before(tmp_path):
    """A server that was rebooted knows its sites by other numbers: nothing is sent again."""
    before, half, whole = Server(tmp_path), DATA, DATA + b"more"
    upload = before.uploads.begin(ref_of(half))
    upload.append(0, half[:3000])
    before.put(whole)
    adopt(tmp_path, "node-7", "node-9")
    after = Server(tmp_path)
    after.store.sweep()  # as a server does that begins
    for data, offset in ((half, 3000), (whole, len(whole))):
        upload = after.uploads.begin(ref_of(data, "node-9"))
        assert upload.offset == offset
        upload.append(offset, data[offset:])
        after.uploads.publish(upload)
        assert (tmp_path / ref_of(data, "node-9").key).read_bytes() == data
    assert not (tmp_path / "node-7").exists()
    adopt(tmp_path, "node-5", "node-6")  # nothing came from there
    assert not (tmp_path / "node-6").exists()


def test_bytes_are_taken_at_the_end_of_what_is_there_alone(tmp_path):
    """Of two writers each byte is taken once, and the other learns the offset."""
    uploads = Server(tmp_path).uploads
    upload = uploads.begin(ref_of(DATA))
    upload.append(0, DATA[:3000])
    for wrong in (0, 2999, 3001):
        with pytest.raises(Refusal, match="3000 bytes are here") as caught:
            upload.append(wrong, b"x")
        assert (caught.value.status, caught.value.offset) == (409, 3000)
    assert uploads.begin(ref_of(DATA)) is upload


@pytest.mark.parametrize("restart", [False, True])
def test_what_has_another_sha256_is_not_published_and_goes(tmp_path, restart):
    """Neither bytes of this process nor an earlier one's are believed."""
    server = Server(tmp_path)
    upload = server.uploads.begin(ref_of(DATA))
    upload.append(0, b"x" + DATA[1:3000])
    server = Server(tmp_path) if restart else server
    upload = server.uploads.begin(ref_of(DATA))
    upload.append(3000, DATA[3000:])
    with pytest.raises(Refusal, match="has the sha256") as caught:
        server.uploads.publish(upload)
    assert caught.value.status == 422
    assert payloads(tmp_path) == []
    server.put(DATA)  # and right the second time
    assert len(payloads(tmp_path)) == 1


def test_a_full_disk_leaves_what_was_written_and_its_hash(tmp_path, monkeypatch):
    """A piece that was cut short goes on within it."""
    server = Server(tmp_path)
    upload = server.uploads.begin(ref_of(DATA))
    write = os.write

    def full(file, data):
        if len(data) < 3000:
            raise OSError(28, "No space left on device")
        return write(file, bytes(data[:3000]))

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match="No space"):
        upload.append(0, DATA)
    monkeypatch.undo()
    assert upload.offset == 6000
    server.put(DATA)
    assert len(payloads(tmp_path)) == 1


def test_the_quota_counts_what_is_there_and_what_is_announced(tmp_path):
    """And each site for itself; a payload that can never fit is refused for good."""
    server = Server(tmp_path, quota_bytes=20_000)
    server.put(DATA)
    server.uploads.begin(ref_of(DATA + b"1"))
    with pytest.raises(Refusal, match="above the quota of 20000") as caught:
        server.uploads.begin(ref_of(DATA + b"2"))
    assert caught.value.status == 507
    server.uploads.begin(ref_of(DATA + b"1"))  # counts once
    server.put(DATA + b"2", "node-8")
    server.store.delete(ref_of(DATA))
    server.put(DATA + b"2")
    with pytest.raises(Refusal, match="above the quota") as caught:
        server.uploads.begin(ref_of(DATA * 3))
    assert caught.value.status == 413


def test_what_was_abandoned_makes_room_for_what_comes(tmp_path):
    """Shards of a killed upload, of which no message tells, fill no quota for ever."""
    server = Server(tmp_path, quota_bytes=28_100)
    for extra in (b"1", b"2"):
        server.put(DATA + extra)
    server.uploads.begin(ref_of(DATA + b"3"))
    server.put(DATA + b"1", "node-8")
    ages = {b"1": 3 * ABANDONED_S, b"2": 2 * ABANDONED_S, b"3": 2.5 * ABANDONED_S}
    files = {}
    for extra, age in ages.items():
        (files[extra],) = (tmp_path / "node-7").glob(f"*{ref_of(DATA + extra).sha256}*")
        os.utime(files[extra], (1e9 - age, 1e9 - age))
    server.uploads.begin(ref_of(DATA + b"4"))  # there is room
    assert all(path.exists() for path in files.values())
    server.uploads.begin(ref_of(DATA + b"5"))
    assert [extra for extra, path in files.items() if path.exists()] == [b"2", b"3"]
    server.uploads.begin(ref_of(DATA + b"6"))
    assert [extra for extra, path in files.items() if path.exists()] == [b"2"]
    os.utime(files[b"2"])
    with pytest.raises(Refusal, match="above the quota"):  # what has just come is fetched
        server.uploads.begin(ref_of(DATA + b"7"))
    assert files[b"2"].exists()
    assert payloads(tmp_path / "node-8") != []


def test_a_disk_without_room_for_the_rest_is_full(tmp_path, monkeypatch):
    """Before a byte is sent in vain."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: Free(6999))
    with pytest.raises(Refusal, match="no room for the 7000 bytes") as caught:
        Server(tmp_path).uploads.begin(ref_of(DATA))
    assert caught.value.status == 507


class Free:
    def __init__(self, free):
        self.free = free


def test_uploads_that_nobody_comes_back_to_are_forgotten(tmp_path):
    """After days, of any site; those that move stay, and payloads too."""
    clock = FakeClock(epoch=1e9)
    server = Server(tmp_path, clock, partial_age_s=7 * DAY)
    server.put(DATA)
    for extra, age in ((b"1", 8 * DAY), (b"2", 6 * DAY)):
        server.uploads.begin(ref_of(DATA + extra, "node-8"))
        (path,) = tmp_path.rglob(f".{ref_of(DATA + extra).sha256}*")
        os.utime(path, (1e9 - age, 1e9 - age))
    clock.time += SWEEP_S
    server.uploads.begin(ref_of(DATA))
    left = payloads(tmp_path)
    assert len(left) == 2
    assert ref_of(DATA + b"2").sha256 in left[0]


def test_a_site_has_so_many_unfinished_uploads(tmp_path):
    """The one that moved last of them stays; a given up one says so, and begins again."""
    server = Server(tmp_path, partials=2)
    uploads = [server.uploads.begin(ref_of(DATA + bytes([i]))) for i in range(2)]
    for i, path in enumerate(sorted(tmp_path.rglob("*.partial"))):
        os.utime(path, (i, i))
    server.uploads.begin(ref_of(DATA))
    assert len(payloads(tmp_path)) == 2
    given_up, kept = sorted(uploads, key=lambda upload: upload.ref.sha256)
    kept.append(0, b"x")
    with pytest.raises(Refusal, match="begin it again") as caught:
        given_up.append(0, b"x")
    assert (caught.value.status, caught.value.offset) == (409, 0)


def test_a_site_that_leaves_takes_all_of_its_own_with_it(tmp_path):
    """And nothing else."""
    server = Server(tmp_path)
    server.put(DATA)
    server.put(DATA, "node-8")
    server.uploads.begin(ref_of(DATA + b"1"))
    (tmp_path / "node-7" / "README").write_text("mine")
    server.uploads.clear("node-7")
    assert payloads(tmp_path / "node-7") == ["README"]
    assert len(payloads(tmp_path / "node-8")) == 1
