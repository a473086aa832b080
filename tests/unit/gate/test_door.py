"""The gate in front of any ASGI application: this user, and nobody else."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from worlds.hosts.stranger import AS_NOBODY, needs_another_user

from flwr_hpc.gate import door

PATHS = ["/", "/v1/control/StartRun", "/docs", "/no/such/path"]
ASK = """
import http.client, sys
for path in sys.argv[2:]:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=20)
    headers = {"X-Forwarded-For": "127.0.0.1:" + sys.argv[1], "Forwarded": "for=127.0.0.1"}
    connection.request("POST", path, body=b"x" * 100_000, headers=headers)
    print(connection.getresponse().status)
"""


class App:
    """Counts what reaches it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.port = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        self.paths.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})


@pytest.fixture(params=[H11Protocol, HttpToolsProtocol])
def app(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[App]:
    """Serve an application through the gate, over both of uvicorn's parsers."""
    for name in ("Config", "Server", "run"):
        monkeypatch.setattr(uvicorn, name, getattr(uvicorn, name))
    monkeypatch.setattr(door, "AutoHTTPProtocol", request.param)
    door.install()
    app = App()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    app.port = server.servers[0].sockets[0].getsockname()[1]
    yield app
    server.should_exit = True
    thread.join()


def ask(app: App, *prefix: str) -> list[int]:
    """Ask for every path in a process of its own; return the answers' codes."""
    command = [*prefix, sys.executable, "-c", ASK, str(app.port), *PATHS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_this_user_is_served(app: App) -> None:
    """Protects our own processes from the gate, on one connection as on many."""
    assert ask(app) == [200] * len(PATHS)
    connection = http.client.HTTPConnection("127.0.0.1", app.port)
    for _ in range(3):
        connection.request("GET", "/again")
        assert connection.getresponse().read() == b"served"
    connection.close()


@needs_another_user
def test_another_user_gets_403_and_the_application_nothing(app: App) -> None:
    """Protects the application: not one request of another user reaches it, whatever its headers
    say about who it is."""
    assert ask(app, *AS_NOBODY) == [403] * len(PATHS)
    assert app.paths == []
    assert ask(app) == [200] * len(PATHS)


def test_the_owner_is_asked_once_per_connection(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the server's time: a table with many rows is read once, not at every request; and a
    port that is used again is looked up again."""
    asked = []
    users = [os.getuid(), os.getuid() + 1]
    monkeypatch.setattr(door, "owner", lambda *ends: asked.append(ends) or users[len(asked) - 1])
    with socket.socket() as client:
        client.bind(("127.0.0.1", 0))
        port = client.getsockname()[1]
    for status in (200, 403):
        here = ("127.0.0.1", app.port)
        connection = http.client.HTTPConnection(*here, source_address=("127.0.0.1", port))
        connection.connect()  # and its port is free at once after it:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for _ in range(3 if status == 200 else 1):
            connection.request("GET", "/")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()
    assert [peer[1] for peer, _ in asked] == [port, port]


def test_what_cannot_be_told_is_refused(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against connections whose owner the system does not know."""

    def unknown(*_: object) -> int:
        raise ValueError("not an address")

    monkeypatch.setattr(door, "owner", unknown)
    assert ask(app) == [403] * len(PATHS)
    assert app.paths == []


def test_refusals_are_logged_once_per_user(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Protects the owner's disk from a stranger who knocks all day."""
    monkeypatch.setattr(door, "_refused", set())
    monkeypatch.setattr(door, "owner", lambda *_: os.getuid() + 1)
    with caplog.at_level(logging.WARNING, logger="uvicorn.error"):
        assert ask(app) == [403] * len(PATHS)
    assert len([r for r in caplog.records if "refused" in r.message]) == 1
