"""The public socket in front of any ASGI application: listed paths for known sites, by TLS."""

from __future__ import annotations

import base64
import http.client
import json
import random
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from worlds.hosts.signed import reply_body

from flwr_hpc.gate import door, listener
from flwr_hpc.gate.certificate import new_certificate, new_key_pair
from flwr_hpc.gate.credentials import Credential, Guests, sha256, write_credentials
from flwr_hpc.gate.outside import MAX_FLEET_BYTES, PublicApp

TOKEN, PULL = "lumi's token", "/v1/fleet/pull-messages"
KEYS = new_key_pair()
LUMI = Credential(sha256(TOKEN), KEYS.public_pem, KEYS.public_ssh, node_id=7)


class App:
    """Reads every body and says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        self.asked.append((scope["path"], size))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})


class World:
    """A server with both sockets, and a client's trust in it."""

    def __init__(self, folder: Path) -> None:
        certificate, key = new_certificate("127.0.0.1")
        self.folder, self.certificate = folder, certificate
        (folder / "cert.pem").write_text(certificate)
        (folder / "key.pem").write_text(key)
        self.credentials = folder / "credentials.json"
        write_credentials(self.credentials, {"lumi": LUMI})
        self.flower, self.exchange = App(), App()
        self.started: list[str] = []  # Sites whose SuperNodes were seen to start
        self.door = socket.create_server(("127.0.0.1", 0))
        self.port = self.door.getsockname()[1]
        self.context = ssl.create_default_context(cadata=certificate)

    def wrap(self, app: Any) -> PublicApp:
        guests = Guests(self.credentials)
        return PublicApp(app, guests, self.exchange, {"run_key": "r1"}, self.started.append)

    def connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        return self.context.wrap_socket(plain, server_hostname="127.0.0.1")

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, context=self.context, timeout=20
        )
        try:
            connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def raw(self, text: bytes) -> bytes:
        """Send bytes through TLS and return all that comes back until the other end closes."""
        got = b""
        with self.connect() as s, suppress(ConnectionError, ssl.SSLError):  # as it may be closed
            s.sendall(text)
            while more := s.recv(65536):
                got += more
        return got


@pytest.fixture
def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[World]:
    """Serve an application on both sockets; the parameter is how long a handshake may take."""
    for name in ("Config", "Server", "run"):
        monkeypatch.setattr(uvicorn, name, getattr(uvicorn, name))
    monkeypatch.setattr(listener, "HANDSHAKE_S", getattr(request, "param", listener.HANDSHAKE_S))
    world = World(tmp_path)
    door.install(outside=door.Outside(world.door, world.wrap))
    config = uvicorn.Config(
        world.flower, port=0, log_config=None, lifespan="off",
        ssl_certfile=str(tmp_path / "cert.pem"), ssl_keyfile=str(tmp_path / "key.pem"),
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while len(getattr(server, "servers", [])) < 2:
        assert thread.is_alive()
    yield world
    server.should_exit = True
    thread.join()
    door.install()


def node(pem: str = KEYS.public_pem) -> dict[str, str]:
    """Return the header by which a SuperNode shows its key."""
    return {"flwr-public-key": base64.b64encode(pem.encode()).decode()}


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_registered_node_reaches_the_fleet_and_a_site_the_exchange(world: World) -> None:
    """Protects the run itself: what belongs is let through, body and all."""
    assert world.ask("POST", PULL, b"x" * 300_000, node()) == (200, b"served")
    assert world.ask("GET", "/v1/exchange/node-7/abc.payload", headers=bearer()) == (200, b"served")
    assert world.flower.asked == [(PULL, 300_000)]
    assert world.exchange.asked == [("/v1/exchange/node-7/abc.payload", 0)]


def test_a_site_asks_what_it_joins(world: World) -> None:
    """Protects a person who joins from surprises: address, certificate and token are right."""
    status, body = world.ask("GET", "/v1/join", headers=bearer())
    own = {"site": "lumi", "folder": "node-7", "heard_s": None}
    assert (status, json.loads(body)) == (200, {"run_key": "r1", **own})


def test_little_waits_in_the_kernel_for_the_line(world: World) -> None:
    """Protects slow lines: megabytes that a cut would lose, and that count as sent already."""
    option = world.door.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
    assert option == listener.UNSENT  # which every connection takes over


def test_a_site_learns_whether_its_invitation_is_in_use(world: World) -> None:
    """Protects a person from joining twice, and from one who has a copy of the invitation."""
    assert world.ask("POST", PULL, b"", node())[0] == 200
    heard_s = json.loads(world.ask("GET", "/v1/join", headers=bearer())[1])["heard_s"]
    assert heard_s >= 0.0


def test_the_start_of_a_supernode_is_noticed(world: World) -> None:
    """Protects the run from waiting for what the one before held; who is refused, as whoever lacks
    the key or comes while the node counts as online, has started nothing."""
    activate = PULL.replace("pull-messages", "activate-node")
    world.flower.status = 403
    assert world.ask("POST", activate, b"", node())[0] == 403
    world.flower.status = 200
    assert world.ask("POST", PULL, b"", node())[0] == 200
    assert world.started == []
    assert world.ask("POST", activate, b"", node())[0] == 200
    assert world.started == ["lumi"]


@pytest.mark.parametrize(("source", "served"), [(7, 200), (8, 403), (0, 403)])
def test_a_node_replies_in_its_own_name_alone(world: World, source: int, served: int) -> None:
    """Protects a site from another, whose signature Flower would find right; nothing of a reply
    that is let through changes."""
    push, body = PULL.replace("pull", "push"), reply_body(7, source, run_id=1)
    assert world.ask("POST", push, body, node())[0] == served
    assert world.flower.asked == [(push, len(body))] * (served == 200)
    assert world.ask("POST", push, b"\xff" + body, node())[0] == 403  # no such message


@pytest.mark.parametrize("headers", [{}, node(new_key_pair().public_pem), {"flwr-public-key": "?"}])
def test_an_unknown_node_is_refused_before_its_body_is_read(
    world: World, headers: dict[str, str]
) -> None:
    """Protects Flower, which would parse the body before it asks who sent it."""
    assert world.ask("POST", PULL, b"x" * 1000, headers)[0] == 401
    assert world.flower.asked == []


@pytest.mark.parametrize("path", ["/v1/join", "/v1/exchange/node-7/abc.payload"])
@pytest.mark.parametrize("headers", [{}, bearer("another"), {"Authorization": TOKEN}, node()])
def test_without_a_token_nothing_is_told(world: World, path: str, headers: dict[str, str]) -> None:
    """Protects payloads and settings from whoever has no invitation."""
    assert world.ask("GET", path, headers=headers)[0] == 401
    assert world.exchange.asked == []


def test_a_revoked_site_is_out_at_once(world: World) -> None:
    """Protects a run after an invitation was lost: no restart is needed."""
    assert world.ask("POST", PULL, b"", node())[0] == 200
    write_credentials(world.credentials, {"lumi": replace(LUMI, revoked=True)})
    assert world.ask("POST", PULL, b"", node())[0] == 401
    assert world.ask("GET", "/v1/join", headers=bearer())[0] == 401


PATHS = [
    "/", "/health", "/docs", "/openapi.json", "/v1", "/v1/control/start-run", "/v1/runtime/x",
    "//v1/control/start-run", "/v1//control/start-run", "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet%2f..%2fcontrol/x", "/v1/fleet/..%2fcontrol",
    "/v1/fleet/x/../../control/x", "/v1/fleet", "/v1/fleet/", "/v1/fleet/%00", "/V1/FLEET/pull",
    "/v1/fleet/pull-messages/", "/v1/fleet;/control", "/v1/exchange/../control/x",
    "/v1/exchange/%2e%2e/x", "/v1/exchange/.hidden", "/v1/exchange//x", "/v1/exchange/",
    "/%76%31/fleet/pull-messages", "/v1/%66leet/pull-messages", "http://x/v1/control/start-run",
    "http://x/v1/fleet/pull-messages", "/v1/join/", "/v1/join/../control",
]  # fmt: skip


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_no_other_path_reaches_anything(world: World, method: str) -> None:
    """Protects Control and Runtime from whoever is let in: a registered node is no owner."""
    answers = {path: world.ask(method, path, b"x", node() | bearer())[0] for path in PATHS}
    assert {path: status for path, status in answers.items() if status not in (400, 404)} == {}
    assert world.flower.asked == world.exchange.asked == []


@pytest.mark.parametrize(
    "text",
    [
        b"CONNECT /v1/control/start-run HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/control/start-run HTTP/1.0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)
def test_other_ways_to_ask_lead_nowhere(world: World, text: bytes) -> None:
    """Protects against proxies' methods, old and new versions of the protocol, and upgrades."""
    answer = world.raw(text)
    assert answer == b"" or answer.split()[1] in (b"400", b"404"), answer
    assert world.flower.asked == []


def test_each_request_of_a_connection_is_judged_by_itself(world: World) -> None:
    """Protects against a good request that brings a bad one along."""
    key = node()["flwr-public-key"]
    good = (
        f"POST {PULL} HTTP/1.1\r\nHost: x\r\nflwr-public-key: {key}\r\nContent-Length: 2\r\n\r\nab"
    )
    bad = f"POST /v1/control/x HTTP/1.1\r\nHost: x\r\nflwr-public-key: {key}\r\n\r\n"
    answer = world.raw((good + bad + good).encode())
    assert [line.split()[1] for line in answer.split(b"\n") if line.startswith(b"HTTP/")] == [
        b"200", b"404",
    ]  # fmt: skip
    assert world.flower.asked == [(PULL, 2)]


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"Content-Length": str(MAX_FLEET_BYTES + 1)}, b"413"),
        ({"Content-Length": "9" * 400}, b"400"),
        ({"Content-Length": "-1"}, b"400"),
        ({"Transfer-Encoding": "chunked"}, b"411"),
        ({"Transfer-Encoding": "chunked", "Content-Length": "5"}, b"411"),
        ({"X": "x" * 40_000}, b"431"),
    ],
)
def test_bodies_and_headers_have_a_limit(world: World, more: dict[str, str], status: bytes) -> None:
    """Protects the server's memory, also from a registered node."""
    lines = "".join(f"{k}: {v}\r\n" for k, v in (node() | more).items())
    answer = world.raw(f"POST {PULL} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
    assert answer.split()[1] in (status, b"400")  # 400: a part of them was too much already
    assert world.flower.asked == []


@pytest.mark.parametrize("world", [4.0], indirect=True)
def test_who_dawdles_is_put_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against slow-loris: half a request, and half a handshake, hold no connection."""
    monkeypatch.setattr(listener, "HEADERS_S", 0.2)
    assert world.raw(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX: ") == b""
    with socket.create_connection(("127.0.0.1", world.port), timeout=20) as plain:
        plain.sendall(b"\x16\x03")
        with _closed():
            assert plain.recv(100) == b""


class _closed:
    """Takes a reset for an end."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, ConnectionError)


def test_one_host_cannot_take_every_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the sites from a stranger who opens connections and does nothing; and connections
    that have ended are counted no more."""
    monkeypatch.setattr(listener.Listener, "admit", _admit_three)
    for _ in range(3):
        idle = [world.connect() for _ in range(3)]
        with pytest.raises((ConnectionError, ssl.SSLError)):
            world.ask("POST", PULL, b"", node())
        for s in idle:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            s.close()
        assert _served_again(world)


_admit = listener.Listener.admit


def _admit_three(self: listener.Listener, host: str) -> bool:
    self.max_per_host = 3
    return _admit(self, host)


def _served_again(world: World) -> bool:
    for _ in range(200):
        try:
            return world.ask("POST", PULL, b"", node())[0] == 200
        except (ConnectionError, ssl.SSLError):
            continue
    return False


def test_a_wrong_certificate_is_not_trusted(world: World) -> None:
    """Protects a site from whoever sits at the server's address with a certificate of his own."""
    stranger, _ = new_certificate("127.0.0.1")
    world.context = ssl.create_default_context(cadata=stranger)
    with pytest.raises(ssl.SSLCertVerificationError):
        world.ask("POST", PULL, b"", node())


def test_what_is_not_tls_is_not_read(world: World) -> None:
    """Protects tokens from being sent in the clear by mistake."""
    with socket.create_connection(("127.0.0.1", world.port), timeout=20) as plain, _closed():
        plain.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n\r\n")
        while more := plain.recv(1000):
            assert b"HTTP" not in more
    assert world.flower.asked == []


def test_ten_thousand_malformed_requests(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Protects memory and disk from a stranger with time: both stay as they were, and the next
    good request is served. Of the requests of a connection those up to the first that is answered
    are read: then it is closed."""
    draw = random.Random(1)
    before = psutil.Process().memory_info().rss
    asked = 0
    while asked < 10_000:
        with world.connect() as s:
            try:
                for _ in range(100):  # pipelined, until we are put out
                    s.sendall(b"".join(_malformed(draw) for _ in range(20)))
                    asked += 20
            except (ConnectionError, ssl.SSLError):
                asked += 20
    assert world.flower.asked == world.exchange.asked == []
    assert world.ask("POST", PULL, b"ok", node())[0] == 200
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert len([r for r in caplog.records if r.name.startswith("uvicorn")]) < 50


def _malformed(draw: random.Random) -> bytes:
    paths = [b"/v1/control/x", b"/v1/fleet/x", b"\xff\xfe", b"/" * 200, b"/v1/fleet/\r\n\r\n"]
    methods = [b"POST", b"GET", b"P\0ST", b"", b"TRACE", b"\x16\x03\x01"]
    lines = [b"Host: x", b"Content-Length: 5", b"Content-Length: x", b": x", b"X: " + b"y" * 9000]
    head = draw.choice(methods) + b" " + draw.choice(paths) + b" HTTP/1.1\r\n"
    return head + b"\r\n".join(draw.sample(lines, 3)) + b"\r\n\r\n" + draw.randbytes(50)
