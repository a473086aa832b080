"""The exchange over HTTP, both halves on a real line: what a cut costs, and who is let in."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading

import pytest
import requests
from worlds.exchange.server import ExchangeServer, write_credential
from worlds.jobs import until
from worlds.network.tcp_proxy import BUFFER, TcpProxy

from flwr_hpc.clock import SystemClock
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.http_client import connection, upload
from flwr_hpc.exchange.http_server import Limits
from flwr_hpc.exchange.resumable import download
from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.stores.file import FileStore
from flwr_hpc.exchange.stores.http import HttpStore
from flwr_hpc.exchange.stores.https import HttpsStore
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Cancelled, Transfer
from flwr_hpc.files import explain_disk_trouble, is_disk_trouble

MB = 1 << 20
OVERHEAD = 64 << 10  # bytes of headers that a test's requests may take


class Impatient(SystemClock):
    """The real clock, but for the pauses between attempts."""

    def sleep(self, seconds):
        super().sleep(min(seconds, 0.02))


@pytest.fixture
def server(tmp_path):
    with ExchangeServer(tmp_path / "server", tls=False) as server:
        yield server


@pytest.fixture
def line(server):
    line = TcpProxy(server.port)
    yield line
    line.close()


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(random.Random(0).randbytes(40 * MB))
    return path


def site(tmp_path, port, token="token-7", **options):
    credential = tmp_path / f"credential-{token}"
    write_credential(credential, token)
    return HttpStore(f"http://127.0.0.1:{port}", credential, clock=Impatient(), **options)


def publish(server, payload):
    """Have a version in the server's folder, as the server does."""
    return FileStore(str(server.root)).put(payload, "global")


def test_an_upload_that_is_cut_goes_on_where_it_stopped(tmp_path, server, line, payload):
    """What is sent again stays below one chunk a cut."""
    cuts = (5 * MB, 11 * MB, 9 * MB)
    line.cut_after(*cuts)
    ref = site(tmp_path, line.port).put(payload, "node-7")
    assert (server.root / ref.key).read_bytes() == payload.read_bytes()
    assert line.up < ref.bytes + len(cuts) * download.CHUNK + OVERHEAD


def test_both_ways_are_reported_with_what_a_cut_had_sent_again(tmp_path, server, line, payload):
    """A person sees how fast the line is, and that a cut costs less than a chunk."""
    store = site(tmp_path, line.port)
    line.cut_after(11 * MB)
    ref = store.put(payload, "node-7")
    line.cut_after(11 * MB)
    store.get(publish(server, payload), tmp_path / "target")
    # the last report is written beside the answer
    up, down = until(lambda: len(done := [m for m in server.moves if m.done]) == 2 and done)
    assert [(m.site, m.way, m.total) for m in (up, down)] == [
        ("node-7", "from_site", ref.bytes), ("node-7", "to_site", ref.bytes),
    ]  # fmt: skip
    assert up.seconds > 0
    assert ref.bytes <= down.bytes < ref.bytes + download.STREAMS * download.CHUNK


def test_a_download_that_is_cut_goes_on_where_it_stopped(tmp_path, server, line, payload):
    """What is sent again stays below one chunk a stream and cut."""
    ref, cuts = publish(server, payload), (5 * MB, 11 * MB, 9 * MB)
    line.cut_after(*cuts)
    transfer = Transfer()
    site(tmp_path, line.port).get(ref, tmp_path / "site" / "target", transfer=transfer)
    assert (tmp_path / "site" / "target").read_bytes() == payload.read_bytes()
    assert [p.name for p in (tmp_path / "site").iterdir()] == ["target"]
    assert line.down < ref.bytes + len(cuts) * download.STREAMS * download.CHUNK
    assert (transfer.done, transfer.total) == (ref.bytes, ref.bytes)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_later_process_goes_on_with_what_an_earlier_one_left(
    tmp_path, server, line, payload, way, monkeypatch
):
    """Hours may lie between them: what is there is in files."""
    ref = publish(server, payload) if way == "down" else None

    def move(store):
        if ref:
            store.get(ref, tmp_path / "site" / "target")
        else:
            store.put(payload, "node-7")

    monkeypatch.setattr(connection, "LEAST_S", 300.0)  # it is the cut that ends it
    small = (socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)  # else a slow reader loses megabytes
    monkeypatch.setattr(connection, "SOCKET_OPTIONS", [*connection.SOCKET_OPTIONS, small])
    server.listener.setsockopt(*small)
    line.cut_after(25 * MB)
    hasty = site(tmp_path, line.port, stall_s=0.0)
    with pytest.raises(TimeoutError, match=r"nothing moved .* for 0 s, after \d+ bytes"):
        move(hasty)
    line.up = line.down = 0
    move(site(tmp_path, line.port))
    assert getattr(line, way) < (15 + 8) * MB + OVERHEAD  # what was still in buffers is lost


def test_a_server_that_is_away_is_waited_for(tmp_path, server, line, payload):
    """And found when it is back, with pauses in between."""
    pauses = []

    class Counting(Impatient):
        def sleep(self, seconds):
            pauses.append(seconds)
            if len(pauses) == 4:
                line.mend()

    line.cut()
    store = site(tmp_path, line.port)
    store._clock = Counting()
    store.put(payload, "node-7")
    assert len(pauses) >= 4
    assert pauses[3] > pauses[0]


def test_a_body_that_stands_still_is_asked_for_anew(tmp_path, server, line, payload, monkeypatch):
    """A host that could not be heard may answer again, and yet send nothing for minutes."""
    ref = publish(server, payload)
    attempts_ended = []

    class Thawing(Impatient):
        def sleep(self, seconds):
            attempts_ended.append(line.frozen.is_set())
            line.thaw()

    monkeypatch.setattr(connection, "BODY_S", connection.LEAST_S)
    store = site(tmp_path, line.port)
    store._clock = Thawing()
    line.freeze_after(10 * MB)  # every connection stays open
    store.get(ref, tmp_path / "target")
    assert attempts_ended[0]
    assert (tmp_path / "target").read_bytes() == payload.read_bytes()


def test_nobody_waits_for_a_cancelled_transfer(tmp_path, server, line, payload):
    """Also while the server is away, and in every stream."""
    ref, transfer = publish(server, payload), Transfer()

    class Cancelling(Impatient):
        def sleep(self, seconds):
            transfer.cancel()

    store = site(tmp_path, line.port)
    store._clock = Cancelling()
    line.cut_after(10 * MB)
    with pytest.raises(Cancelled):
        store.get(ref, tmp_path / "target", transfer=transfer)
    assert not (tmp_path / "target").exists()
    store = site(tmp_path, line.port)
    store.get(ref, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == payload.read_bytes()


def test_two_sites_of_one_name_send_the_same_at_once(tmp_path, server, payload):
    """As a ClientApp that is started again while the first still sends."""
    stores = [site(tmp_path, server.port) for _ in range(3)]
    threads = [threading.Thread(target=s.put, args=(payload, "node-7")) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (found,) = server.root.rglob("*.*")
    assert found.read_bytes() == payload.read_bytes()


def test_two_processes_fetch_the_same_into_one_folder(tmp_path, server, payload):
    """Neither spoils what the other has."""
    ref = publish(server, payload)
    targets = [tmp_path / "site" / name for name in "ab"]
    stores = [site(tmp_path, server.port) for _ in targets]
    threads = [
        threading.Thread(target=s.get, args=(ref, t)) for s, t in zip(stores, targets, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((tmp_path / "site").iterdir()) == targets
    assert all(t.read_bytes() == payload.read_bytes() for t in targets)


def test_an_upload_onto_spoilt_bytes_begins_anew(tmp_path, server, payload):
    """As a crash of the server's machine may leave: of the right length, but not written."""
    ref = Reference.of("node-7", hashlib.sha256(payload.read_bytes()).hexdigest(), 40 * MB)
    partial = server.root / "node-7" / f".{ref.sha256}.{ref.bytes}.partial"
    partial.parent.mkdir(mode=0o700)
    partial.write_bytes(bytes(30 * MB))
    site(tmp_path, server.port).put(payload, "node-7")
    assert (server.root / ref.key).read_bytes() == payload.read_bytes()


def test_a_file_that_is_not_what_it_is_called_is_refused(tmp_path, server, payload):
    """Once, and nothing of it stays."""
    with pytest.raises(BadPayload, match="has the sha256"):
        site(tmp_path, server.port).put(payload, "node-7", "0" * 64)
    assert not [p for p in server.root.rglob("*") if p.is_file()]


def test_a_disk_that_is_full_is_waited_for_by_who_sent_it(tmp_path, payload):
    """The site meets it as its own full disk, and nothing is sent twice."""
    with ExchangeServer(tmp_path / "server", tls=False, limits=Limits(quota_bytes=50 * MB)) as full:
        other = tmp_path / "other"
        other.write_bytes(bytes(20 * MB))
        store = site(tmp_path, full.port)
        ref = store.put(other, "node-7")
        with pytest.raises(OSError, match="above the quota") as caught:
            store.put(payload, "node-7")
        assert is_disk_trouble(caught.value)
        assert explain_disk_trouble(caught.value, tmp_path).startswith(full.url)
        store.delete(ref)
        store.put(payload, "node-7")


def test_what_can_never_fit_is_no_full_disk(tmp_path, payload):
    """Waiting would not help; no byte of it is sent."""
    with ExchangeServer(tmp_path / "server", tls=False, limits=Limits(quota_bytes=MB)) as small:
        line = TcpProxy(small.port)
        with pytest.raises(OSError, match="above the quota of 1048576") as caught:
            site(tmp_path, line.port).put(payload, "node-7")
        assert not is_disk_trouble(caught.value)
        assert line.up < OVERHEAD
        line.close()


def test_a_site_sees_the_servers_payloads_and_its_own(tmp_path, server, payload):
    """Another site's are not there for it, to read, write or delete."""
    ours, theirs = site(tmp_path, server.port), site(tmp_path, server.port, "token-8")
    ref = theirs.put(payload, "node-8")
    assert ours.size(ref) is None
    with pytest.raises(BadPayload):
        ours.get(ref, tmp_path / "target")
    for folder in ("node-8", "global", "shared"):
        with pytest.raises(BadPayload, match="not found"):
            ours.put(payload, folder)
    with pytest.raises(BadPayload, match="not found"):
        ours.delete(ref)
    assert theirs.size(ref) == ref.bytes


def test_a_revoked_site_is_told_and_does_not_try_again(tmp_path, server, payload):
    """At once: a person has to act."""
    with pytest.raises(PermissionError, match="no longer"):
        site(tmp_path, server.port, "token-9").put(payload, "node-7")


def test_a_site_speaks_to_the_server_of_its_invitation_alone(tmp_path, payload, monkeypatch):
    """Not to one that a centre's own authorities, or the environment's, vouch for."""
    from worlds.exchange import server as exchange_server

    with ExchangeServer(tmp_path / "server") as server:
        right = exchange_server.key_and_certificate()[1]
        exchange_server.key_and_certificate.cache_clear()
        other = exchange_server.key_and_certificate()[1]
        bundle = tmp_path / "bundle.pem"
        bundle.write_text(right)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
        credential = write_credential(tmp_path / "credential", certificate=other)
        with pytest.raises(PermissionError, match="is not the server"):
            HttpsStore(server.url, credential).put(payload, "node-7")
        write_credential(credential, certificate=right)
        HttpsStore(server.url, credential).put(payload, "node-7")


def test_a_credential_is_kept_secret(tmp_path):
    """Neither sent in the clear, nor readable by others."""
    credential = write_credential(tmp_path / "credential")
    with pytest.raises(UserError, match="in the clear"):
        HttpStore("http://server.example:80", credential).check()
    os.chmod(credential, 0o640)
    with pytest.raises(UserError, match="chmod 600"):
        HttpsStore("https://server.example", credential).check()
    with pytest.raises(UserError, match=r"flwr_hpc\.join"):
        HttpsStore("https://server.example").check()


def test_a_centres_proxy_is_used(tmp_path, payload, monkeypatch):
    """As its environment says, and not where that says not to; TLS goes through it to the end."""
    with ExchangeServer(tmp_path / "server") as server:
        proxy = TcpProxy(server.port, connect=True)
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        credential = write_credential(tmp_path / "credential")
        for no_proxy, asked in (("127.0.0.1", []), ("", [f"CONNECT 127.0.0.1:{server.port} "])):
            monkeypatch.setenv("no_proxy", no_proxy)
            ref = HttpsStore(server.url, credential).put(payload, "node-7")
            assert [line.partition("HTTP")[0] for line in proxy.asked] == asked
            assert (server.root / ref.key).read_bytes() == payload.read_bytes()
        proxy.close()


def test_ranges_are_read_exactly(tmp_path, server, payload):
    """First, last, middle and open; what is not there is refused."""
    ref, data = publish(server, payload), payload.read_bytes()
    url, auth = f"{server.url}/v1/exchange/{ref.key}", {"Authorization": "Bearer token-7"}

    def ask(range_):
        return requests.get(url, headers={**auth, "Range": range_}, timeout=60)

    for first, last in ((0, 0), (0, 99), (12345, 2345678), (len(data) - 1, len(data) - 1)):
        answer = ask(f"bytes={first}-{last}")
        assert (answer.status_code, answer.content) == (206, data[first : last + 1])
        assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{len(data)}"
    assert ask(f"bytes={len(data) - 5}-").content == data[-5:]
    assert ask(f"bytes=7-{len(data) * 2}").content == data[7:]
    for wrong in (f"bytes={len(data)}-", "bytes=5-4", "bytes=-5", "bytes=0-1,3-4", "lines=0-1"):
        assert ask(wrong).status_code == 416
    assert requests.get(url, headers=auth, timeout=60).content == data


def test_another_protocol_is_refused_with_what_to_do(tmp_path, server, payload, monkeypatch):
    """Protects weights from a site that was updated meanwhile, and means other things by them."""
    store = site(tmp_path, server.port)
    monkeypatch.setattr(connection, "PROTOCOL", 9)
    with pytest.raises(OSError, match=r"speaks protocol 1, and the site 9: .*type it again"):
        store.put(payload, "node-7")
    assert not list(server.root.rglob("*.payload"))


def test_head_tells_how_far_an_upload_is(tmp_path, server, payload):
    """While it is under way; then how large it is."""
    store, data = site(tmp_path, server.port), payload.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    url = f"{server.url}/v1/exchange/node-7/{sha256}.payload"
    auth = {"Authorization": "Bearer token-7"}
    assert "Upload-Offset" not in requests.head(url, headers=auth, timeout=60).headers
    part = {**auth, "Content-Range": f"bytes 0-999/{len(data)}"}
    assert requests.put(url, data[:1000], headers=part, timeout=60).status_code == 202
    assert requests.head(url, headers=auth, timeout=60).headers["Upload-Offset"] == "1000"
    store.put(payload, "node-7")
    answer = requests.head(url, headers=auth, timeout=60)
    assert (answer.status_code, answer.headers["Content-Length"]) == (200, str(len(data)))


def test_an_upload_takes_many_requests_where_it_is_long(tmp_path, server, payload, monkeypatch):
    """Each begins where the last ended."""
    monkeypatch.setattr(upload, "CHUNK", 3 * MB)
    ref = site(tmp_path, server.port).put(payload, "node-7")
    assert (server.root / ref.key).read_bytes() == payload.read_bytes()
