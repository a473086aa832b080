"""The gate itself: uvicorn, patched so that it serves connections of this user only.

A second socket may be there for the world, see `flwr_hpc.gate.listener`; which socket a connection
came in at decides what it gets, and nothing that it says.

Flower's programs hand uvicorn an application; nothing of Flower is touched. The peer is looked up
once, when its connection is accepted, and the answer dies with the connection: no request is read
before it, none can pretend to come from elsewhere, a port that is used again is looked up again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from flwr_hpc.gate.listener import Listener
from flwr_hpc.gate.outside import App
from flwr_hpc.gate.peers import owner

logger = logging.getLogger("uvicorn.error")

_refused: set[int | None] = set()

LINGER_S = 2.0  # for a refused peer to read the refusal
REASON = b"this server belongs to another user of this host\n"
REFUSAL = (
    b"HTTP/1.1 403 Forbidden\r\ncontent-type: text/plain\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(REASON), REASON)
)


class Door(asyncio.Protocol):
    """Looks who is there, then hands the connection to uvicorn's own protocol, or refuses it.

    Takes what uvicorn gives its protocols.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        protocol = AutoHTTPProtocol(**self._options) if _admitted(transport) else Refusal()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


class Refusal(asyncio.Protocol):
    """Answers 403, whatever was asked, and reads nothing of it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.write(REFUSAL)
        if transport.can_write_eof():
            transport.write_eof()  # closing now would reset what the peer has not yet read
        asyncio.get_running_loop().call_later(LINGER_S, transport.abort)


def _admitted(transport: asyncio.Transport) -> bool:
    """Tell whether a connection is of this user; what cannot be told is not."""
    try:
        peer, here = (transport.get_extra_info(end)[:2] for end in ("peername", "sockname"))
        user = owner(peer, here)
    except (TypeError, ValueError):  # no TCP connection, or gone already
        user = None
    if user == os.getuid():
        return True
    if user not in _refused:  # once each: nobody fills this user's disk
        _refused.add(user)
        whose = "nobody known (it left, or is of another host)" if user is None else f"user {user}"
        logger.warning("refused a connection of %s; further ones are not logged", whose)
    return False


class Config(uvicorn.Config):
    """uvicorn's, with the gate at the door."""

    def __init__(self, app: Any, **options: Any) -> None:
        # Headers would say that the peer is another one; nobody stands between.
        mine = {"http": Door, "ws": "none", "proxy_headers": False}
        super().__init__(app, **{**options, **mine})


@dataclass(frozen=True)
class Outside:
    """The public socket, and what is put around the application for it."""

    door: socket.socket
    wrap: Callable[[App], App]


class Server(uvicorn.Server):
    """uvicorn's, on sockets of ours: one for this host; others may stand beside it."""

    reserved = False  # Whether another process of this user keeps the port for us
    outside: Outside | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(sockets or [self._listen()])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.outside is None or not self.started:
            return
        app = self.outside.wrap(self.config.loaded_app)
        listener = Listener(self.config, self.server_state, app, self.lifespan.state)
        self.servers.append(await listener.listen(self.outside.door))

    def _listen(self) -> socket.socket:
        host, port = self.config.host, self.config.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, port), family=family, reuse_port=self.reserved)
        except OSError as exc:
            raise SystemExit(f"{host}:{port}: {exc}") from None


def run(app: Any, **options: Any) -> None:
    """Serve an application until the end, like `uvicorn.run`."""
    server = Server(Config(app, **options))
    server.run()
    if not server.started:
        raise SystemExit(1)


def install(reserved: bool = False, outside: Outside | None = None) -> None:
    """Put the gate into uvicorn; programs that are loaded later get it.

    Parameters
    ----------
    reserved : bool
        Whether the port is reserved by `flwr_hpc.flower.processes.reserve_port`.
    outside : Outside or None
        What is served to the world; None: nothing.
    """
    Server.reserved, Server.outside = reserved, outside
    uvicorn.Config, uvicorn.Server, uvicorn.run = Config, Server, run  # type: ignore[assignment,misc]
