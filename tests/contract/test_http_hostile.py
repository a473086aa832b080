"""What peers may try on the exchange's server: refused, within bounded memory, to nobody's harm."""

from __future__ import annotations

import hashlib
import os
import random
import re
import socket
import string
import threading
import time
from contextlib import suppress

import psutil
import pytest
from worlds.exchange.server import ExchangeServer, write_credential
from worlds.jobs import until
from worlds.network.tcp_proxy import TcpProxy

from flwr_hpc.exchange.http_server import Limits
from flwr_hpc.exchange.http_server.uploads import PARTIAL, Upload
from flwr_hpc.exchange.store import KEY
from flwr_hpc.exchange.stores.file import FileStore
from flwr_hpc.exchange.stores.http import HttpStore

MB = 1 << 20
DATA = b"weights" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()
OWN = f"/v1/exchange/node-7/{SHA256}.payload"
BEARER = "Authorization: Bearer token-7"
BUFFERS = 16 * MB  # what kernels and the proxy may hold on a line


@pytest.fixture
def server(tmp_path):
    with ExchangeServer(tmp_path / "server", tls=False) as server:
        yield server


def ask(server, head, body=b"", lines=(BEARER,)):
    """Send a request as it is; return the status and all that comes, until the line is closed."""
    with socket.create_connection(("127.0.0.1", server.port), 60) as line:
        text = "\r\n".join([f"{head} HTTP/1.1", "Host: x", "Connection: close", *lines])
        answer = b""
        with suppress(ConnectionError):  # a refusal need not hear us out
            line.sendall(text.encode("latin-1") + b"\r\n\r\n" + body)
            while data := line.recv(1 << 16):
                answer += data
    return int(answer.split(b" ")[1]) if answer else 0, answer


def put(server, range_, body=b"", *lines, path=OWN):
    length = [f"Content-Length: {len(body)}"] if "Transfer-Encoding: chunked" not in lines else []
    return ask(server, f"PUT {path}", body, [BEARER, f"Content-Range: {range_}", *length, *lines])


def files(server):
    return {str(p.relative_to(server.root.parent)) for p in server.root.parent.rglob("*")}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/exchange/",
        "/v1/exchange/global",
        "/v1/exchange/../key",
        f"/v1/exchange/../node-7/{SHA256}.payload",
        f"/v1/exchange/node-7/../node-8/{SHA256}.payload",
        f"/v1/exchange/node-7/..%2fnode-8%2f{SHA256}.payload",
        f"/v1/exchange/node-7%00/{SHA256}.payload",
        f"/v1/exchange//{SHA256}.payload",
        f"/v1/exchange/node-7/{SHA256}.payload/",
        f"/v1/exchange/node-7/{SHA256}.payload%0a",
        f"/v1/exchange/node-7/.{SHA256}.7000.partial",
        f"/v1/exchange/node-8/{SHA256}.payload",
        f"/v1/exchange/node-77/{SHA256}.payload",
        "/v1/exchange/node-7/" + "a" * 64 + ".payload",
        "/v1/exchange/" + "a/" * 2000,
        f"/v2/node-7/{SHA256}.payload",
        "/etc/passwd",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_there_is_nothing_but_the_servers_payloads_and_ones_own(server, method, path):
    """One answer for all that is not, or is not the site's; nothing is made of what is asked."""
    (server.root / "node-8").mkdir()
    (server.root / "node-8" / f"{SHA256}.payload").write_bytes(DATA)
    before = files(server)
    if path.endswith("a.payload") and method in ("PUT", "DELETE"):
        return  # its own folder, where it may
    status, answer = ask(server, f"{method} {path}")
    assert status == 404
    assert DATA[:50] not in answer
    assert files(server) == before


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Authorization: Basic x"],
        ["Authorization: Bearer "],
        ["Authorization: Bearer token-9"],
        ["Authorization: token-7"],
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH"])
def test_who_has_no_credential_is_told_nothing(server, method, lines):
    """Not even whether there is such a thing."""
    assert {ask(server, f"{method} {p}", lines=lines)[0] for p in (OWN, "/x")} == {401}
    assert files(server) <= {"store", "key", "certificate"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_anothers_payload_is_as_if_it_were_not_there(server, method):
    """Not even whether another site has sent something can be learnt: the answers are the same."""
    (server.root / "node-8").mkdir(parents=True)
    (server.root / "node-8" / f"{SHA256}.payload").write_bytes(DATA)
    there, nowhere = (f"/v1/exchange/node-8/{s}.payload" for s in (SHA256, "0" * 64))
    answers = [ask(server, f"{method} {path}") for path in (there, nowhere)]
    assert [status for status, _ in answers] == [404, 404]
    assert len({re.sub(rb"date: .*?\r\n", b"", text) for _, text in answers}) == 1
    assert (server.root / "node-8" / f"{SHA256}.payload").read_bytes() == DATA
    assert {ask(server, f"GET {p}")[0] for p in (OWN, OWN.replace("node-7", "global"))} == {404}


@pytest.mark.parametrize(
    ("range_", "body", "status"),
    [
        ("bytes 0-6999/7000", DATA[:-1], 400),  # lengths that do not agree
        ("bytes 0-99/7000", DATA, 400),
        ("bytes */7000", DATA, 400),
        ("bytes 6999-7000/7000", b"xx", 400),
        ("bytes 5-4/7000", b"", 400),
        ("bytes 0-0/0", b"x", 400),
        ("bytes -5/7000", b"", 400),
        ("bytes 0-/7000", b"", 400),
        ("bytes 0-99/*", DATA[:100], 400),
        ("bytes \u0660-\u0669/\u0667\u0660", b"", 400),
        ("bytes " + "9" * 5000 + "-1/2", b"", 400),
        ("", b"", 400),
        ("bytes */" + "9" * 18, b"", 413),
        ("bytes 100-199/7000", DATA[100:200], 409),  # a gap
    ],
)
def test_ranges_that_are_none_are_refused(server, range_, body, status):
    """And nothing of them is written."""
    found, _ = put(server, range_.encode().decode("latin-1"), body)
    assert found == status
    assert not [p for p in server.root.rglob("*") if p.is_file() and p.stat().st_size]


def test_more_bytes_than_announced_are_not_taken(server):
    """Where a body has no length."""
    body = b"1b58\r\n" + DATA + b"\r\n1\r\nx\r\n0\r\n\r\n"
    status, answer = put(server, "bytes 0-6999/7000", body, "Transfer-Encoding: chunked")
    assert (status, b"more than the 7000" in answer) == (400, True)


def test_fewer_bytes_than_announced_are_kept_and_counted(server):
    """The answer is the offset from which to go on."""
    body = b"64\r\n" + DATA[:100] + b"\r\n0\r\n\r\n"
    status, answer = put(server, "bytes 0-6999/7000", body, "Transfer-Encoding: chunked")
    assert (status, b"upload-offset: 100" in answer.lower()) == (202, True)
    assert put(server, "bytes 100-6999/7000", DATA[100:])[0] == 200


def test_a_body_that_stands_still_is_cut_off(tmp_path):
    """Its bytes stay; the site's place is free again."""
    limits = Limits(idle_s=1.0)
    with ExchangeServer(tmp_path / "server", tls=False, limits=limits) as server:
        with socket.create_connection(("127.0.0.1", server.port), 60) as line:
            head = f"PUT {OWN} HTTP/1.1\r\nHost: x\r\n{BEARER}\r\nContent-Length: 7000\r\n"
            line.sendall(f"{head}Content-Range: bytes 0-6999/7000\r\n\r\n".encode() + DATA[:50])
            answer = line.recv(1 << 16)
        assert b" 408 " in answer.splitlines()[0]
        assert b"upload-offset: 50" in answer.lower()
        assert put(server, "bytes 50-6999/7000", DATA[50:])[0] == 200


def test_there_are_four_methods(server):
    """Others are named the valid ones."""
    status, answer = ask(server, f"POST {OWN}")
    assert (status, b"GET, HEAD, PUT and DELETE" in answer) == (405, True)


def test_headers_without_end_are_refused(server):
    """As by the gate, after 16 KB."""
    assert ask(server, f"GET {OWN}", lines=[BEARER, "X: " + "x" * (1 << 20)])[0] in (400, 431, 0)


def test_a_site_has_so_many_requests_at_once(tmp_path):
    """More are refused, and the other sites' are not."""
    limits = Limits(requests=2, idle_s=30.0)
    with ExchangeServer(tmp_path / "server", tls=False, limits=limits) as server:
        lines = []
        for i in range(2):
            sha256 = f"{i}" * 64
            line = socket.create_connection(("127.0.0.1", server.port), 60)
            head = f"PUT /v1/exchange/node-7/{sha256}.payload HTTP/1.1\r\nHost: x\r\n{BEARER}\r\n"
            head += "Content-Length: 10\r\nContent-Range: bytes 0-9/10\r\n\r\n12345"
            line.sendall(head.encode())
            lines.append(line)
        until(lambda: len(list(server.root.rglob("*.partial"))) == 2)  # both are being served
        assert ask(server, f"HEAD {OWN}")[0] == 429
        assert ask(server, f"HEAD {OWN}", lines=["Authorization: Bearer token-8"])[0] == 404
        for line in lines:
            line.close()
        until(lambda: ask(server, f"HEAD {OWN}")[0] == 404)


def settle(line):
    """Wait until nothing passes any more; return how much has."""
    until(lambda: line.up + line.down)
    count = -1
    while count != (count := line.up + line.down):
        time.sleep(0.3)
    return count


def test_a_disk_that_hangs_holds_the_peer_up(tmp_path, monkeypatch):
    """Back-pressure: the server takes no more than it can put down."""
    go, append = threading.Event(), Upload.append

    def slow(self, offset, data):
        go.wait()
        append(self, offset, data)

    monkeypatch.setattr(Upload, "append", slow)
    payload = tmp_path / "payload"
    payload.write_bytes(random.Random(0).randbytes(60 * MB))
    with ExchangeServer(tmp_path / "server", tls=False) as server:
        line = TcpProxy(server.port)
        credential = write_credential(tmp_path / "credential")
        store = HttpStore(f"http://127.0.0.1:{line.port}", credential)
        sending = threading.Thread(target=store.put, args=(payload, "node-7"))
        sending.start()
        assert settle(line) < BUFFERS
        go.set()
        sending.join()
        line.close()
        assert [p.stat().st_size for p in server.root.rglob("*.payload")] == [60 * MB]


def test_a_peer_that_takes_nothing_is_sent_little_and_cut_off(tmp_path):
    """The server reads ahead of no one."""
    payload = tmp_path / "payload"
    payload.write_bytes(bytes(60 * MB))
    limits = Limits(idle_s=1.0, requests=1)
    with ExchangeServer(tmp_path / "server", tls=False, limits=limits) as server:
        ref = FileStore(str(server.root)).put(payload, "global")
        line = TcpProxy(server.port)
        with socket.create_connection(("127.0.0.1", line.port)) as peer:
            head = f"GET /v1/exchange/{ref.key} HTTP/1.1\r\nHost: x\r\n{BEARER}\r\n\r\n"
            peer.sendall(head.encode())
            assert 0 < settle(line) < BUFFERS
            until(lambda: ask(server, f"HEAD {OWN}")[0] == 404)  # it gave up the site's one place
            taken = 0
            while data := peer.recv(1 << 20):  # what was on its way, and then the end
                taken += len(data)
        assert taken < BUFFERS
        line.close()


def requests(count):
    """Yield requests as no honest site sends them, the same at every run."""
    draw = random.Random(7)
    words = [
        *("node-7", "global", "node-8", "..", ".", "", "%2e%2e", "own", "a" * 300, "\xff\x00"),
        *(f"{SHA256}.payload", f"{SHA256}", f".{SHA256}.7000.partial", f"{'0' * 64}.payload"),
    ]
    numbers = ["0", "1", "-1", "6999", "7000", "7001", "9" * 18, "9" * 40, "", "*", "x", "1e3"]
    for _ in range(count):
        path = "/v1/exchange/" + "/".join(draw.choices(words, k=draw.randint(0, 3)))
        method = draw.choice(
            ["GET", "HEAD", "PUT", "PUT", "PUT", "DELETE", "POST", "TRACE", "\x01"]
        )
        first, last, total = draw.choices(numbers, k=3)
        body = os.urandom(1) * draw.choice([0, 1, 100, 7000])
        lines = [
            draw.choice([BEARER, BEARER, BEARER, "Authorization: Bearer x", "X: y"]),
            f"Content-Range: bytes {first}-{last}/{total}",
            f"Range: bytes={first}-{last}",
            f"Content-Length: {draw.choice([len(body), len(body), *numbers])}",
            "".join(draw.choices(string.printable, k=draw.randint(0, 40))),
        ]
        lines = draw.sample(lines, draw.randint(0, len(lines)))
        yield "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]), body


def test_a_thousand_malformed_requests_harm_nobody(server, tmp_path):
    """Nothing appears but the site's own payloads and what is to become some; memory stays."""
    payload = tmp_path / "payload"
    payload.write_bytes(DATA)
    store = HttpStore(server.url, write_credential(tmp_path / "credential", "token-8"))
    ref, memory = store.put(payload, "node-8"), psutil.Process().memory_info().rss
    statuses = set()
    for head, body in requests(1000):
        with socket.create_connection(("127.0.0.1", server.port), 60) as line:
            try:
                line.sendall(head.encode("latin-1", "replace") + body)
                line.shutdown(socket.SHUT_WR)
                statuses.add(line.recv(1 << 16)[9:12])
            except OSError:
                statuses.add(b"")
    assert not any(status.startswith(b"5") and status != b"507" for status in statuses)
    assert {b"400", b"401", b"404"} <= statuses
    for path in server.root.rglob("*"):
        if path.is_file():
            key = str(path.relative_to(server.root))
            assert KEY.fullmatch(key) or PARTIAL.fullmatch(path.name), key
            assert path.parent.name in ("node-7", "node-8")
            assert path.suffix != ".payload" or path.read_bytes() == DATA
    assert psutil.Process().memory_info().rss - memory < 30 * MB
    store.get(ref, tmp_path / "target")
