"""What is peculiar to stores of other people's servers: trust, lost lines, half uploads."""

from __future__ import annotations

import logging
import uuid

import psutil
import pytest
from worlds.network import s3_server, sftp_server
from worlds.network.sshd import sshd

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.store import make_store
from flwr_hpc.exchange.stores import fsspec as fsspec_store

DATA = b"weights" * 400_000
needs_sftp = pytest.mark.skipif(bool(sftp_server.MISSING), reason=sftp_server.MISSING)
needs_s3 = pytest.mark.skipif(bool(s3_server.MISSING), reason=s3_server.MISSING)

sftp = pytest.fixture(scope="module")(sftp_server.serve)
s3 = pytest.fixture(scope="module")(s3_server.serve)


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(DATA)
    return path


@needs_sftp
@pytest.mark.parametrize("trusted", ["nothing", "another key"])
def test_a_host_that_is_not_known_gets_no_payload(trusted, payload, tmp_path, monkeypatch):
    """Whoever answers in the server's place must not be given the weights."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    with sshd(tmp_path / "sshd", "Subsystem sftp internal-sftp") as server:
        known = tmp_path / "sshd" / "known_hosts"
        other = (tmp_path / "sshd" / "user_key.pub").read_text()
        known.write_text("" if trusted == "nothing" else f"[127.0.0.1]:{server.port} {other}")
        (tmp_path / "home" / ".ssh" / "config").write_text(server.config.read_text())
        store = make_store(f"sftp://far{tmp_path}/store")
        with pytest.raises(UserError, match=r"HostKeyNotVerifiable.*known_hosts.*fingerprint"):
            store.check()
        with pytest.raises(OSError, match="known_hosts"):
            store.put(payload)
    assert not (tmp_path / "store").exists()


@needs_sftp
def test_a_lost_connection_is_made_anew(sftp, payload, tmp_path):
    """A site's order takes hours, and its connection need not live so long."""
    store = make_store(f"sftp://far{tmp_path}/store")
    ref = store.put(payload)
    for i in range(2):
        sftp.refuse()
        sftp.start()
        store.get(ref, tmp_path / f"target{i}")
        assert (tmp_path / f"target{i}").read_bytes() == DATA
    sftp.refuse()
    with pytest.raises(OSError, match="sftp://far"):
        store.size(ref)
    sftp.start()
    assert store.size(ref) == len(DATA)


@needs_sftp
def test_a_silent_connection_is_given_up(tmp_path, payload, sftp, monkeypatch):
    """A half-open line answers nothing, for ever; a new one does."""
    eager = fsspec_store.SSH | {"keepalive_interval": 0.2}
    monkeypatch.setitem(fsspec_store.OPTIONS, "sftp", eager)
    store = make_store(f"sftp://far{tmp_path}/store")
    ref = store.put(payload)
    sessions = psutil.Process(sftp._process.pid).children(recursive=True)
    for process in sessions:
        process.suspend()
    try:
        assert store.size(ref) == len(DATA)
    finally:
        for process in sessions:
            process.resume()


@needs_sftp
def test_an_upload_appears_whole_or_not_at_all(sftp, payload, tmp_path, monkeypatch):
    """A reader never meets a part, and a new session clears what a killed upload has left."""
    store = make_store(f"sftp://far{tmp_path}/store")
    ref = store.put(payload, "global")
    store.delete(ref)
    fs, root = fsspec_store.connect(store.url)

    async def cut(self, source, target, **_):
        assert not await self._exists(target)
        assert (await self._info(source))["size"] == len(DATA)
        raise ConnectionError("cut off")

    store._disconnect(store._place())  # a file system binds its methods when it connects
    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "_mv", cut)
        with pytest.raises(OSError, match="cut off"):
            store.put(payload, "global")
    store._disconnect(store._place())
    assert store.size(ref) is None
    assert fs.find(root) == [f"{root}/{ref.key}.part"]  # another attempt goes on with it
    fs.pipe_file(f"{root}/{ref.key}.0123abcd.tmp", DATA[:5])
    fs.pipe_file(f"{root}/global/notes.tmp", b"mine")
    store.sweep()
    assert fs.find(root) == [f"{root}/global/notes.tmp"]


@needs_s3
@pytest.mark.parametrize("wrong", ["secret", "none"])
def test_wrong_credentials_are_an_error_that_does_not_show_them(
    wrong, s3, payload, tmp_path, monkeypatch, caplog
):
    """Neither messages nor logs may give away what opens the bucket."""
    caplog.set_level(logging.DEBUG, logger="flwr_hpc")
    for name, value in s3_server.aws_files(tmp_path, s3.url, "not-the-secret").items():
        monkeypatch.setenv(name, value)
    if wrong == "none":
        (tmp_path / "credentials").unlink()
    store = make_store(f"s3://bucket/{uuid.uuid4().hex}")
    store._disconnect(store._place())
    fsspec_store.connect(store.url)[0].clear_instance_cache()
    with pytest.raises(UserError, match=r"exchange\.store cannot be reached") as caught:
        store.check()
    if wrong == "none":
        assert "~/.aws/credentials" in str(caught.value)
    with pytest.raises(OSError) as failed:  # noqa: PT011 - which one is the server's matter
        store.put(payload)
    assert "not-the-secret" not in f"{caught.value} {failed.value} {caplog.text}"


@needs_s3
def test_large_payloads_go_to_s3_in_parts_and_come_back_whole(s3, tmp_path):
    """Above 50 MB an upload has several parts, of which none may be seen alone."""
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (220 << 10))  # 55 MiB
    store = make_store(f"s3://bucket/{uuid.uuid4().hex}")
    ref = store.put(path)
    store.get(ref, tmp_path / "target")
    assert (tmp_path / "target").stat().st_size == ref.bytes


@needs_s3
def test_a_new_session_aborts_what_cut_uploads_left_and_nothing_else(s3):
    """Parts that nobody completes are seen by nobody, and paid for."""
    store = make_store(f"s3://bucket/{uuid.uuid4().hex}")
    fs, root = fsspec_store.connect(store.url)
    folder = root.partition("/")[2]
    ours, theirs = f"{folder}/node-7/{'0' * 64}.payload", f"{folder}/node-7/film"
    for key in (ours, theirs):
        fs.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    store.sweep()
    begun = fs.call_s3("list_multipart_uploads", Bucket="bucket", Prefix=folder)["Uploads"]
    assert [upload["Key"] for upload in begun] == [theirs]
    fs.abort_mpu("bucket", theirs, begun[0]["UploadId"])


@needs_sftp
def test_an_upload_is_not_continued_onto_something_longer(sftp, payload, tmp_path):
    """What cannot be the beginning of the payload is overwritten."""
    store = make_store(f"sftp://far{tmp_path}/store")
    ref = store.put(payload)
    store.delete(ref)
    fs, root = fsspec_store.connect(store.url)
    fs.pipe_file(f"{root}/{ref.key}.part", b"x" * (len(DATA) + 1))
    store.get(store.put(payload), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == DATA


@needs_s3
def test_a_bucket_is_never_made(s3, payload):
    """A slip in its name must not create one, which somebody pays for and others may read."""
    store = make_store(f"s3://no-{uuid.uuid4().hex[:8]}/run")
    with pytest.raises(OSError):  # noqa: PT011 - which one is the server's matter
        store.put(payload)
    assert [p.name for p in (s3.folder / "objects").iterdir()] == [s3_server.BUCKET]
