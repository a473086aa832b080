"""The public socket: how connections from anywhere are taken without harm.

TLS comes first, then one parser with a limit for headers; both must be done within seconds.
Memory is bounded by the number of connections, which have a limit, too.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from flwr_hpc.gate.outside import MAX_HEADERS, App

MAX_CONNECTIONS = 1024
MAX_PER_HOST = 256  # A tunnel or a network's one address may stand for several sites
HANDSHAKE_S = 15.0
HEADERS_S = 15.0
# Bytes of a connection that wait in the kernel for their turn on the line, else megabytes: a cut
# loses them, and by so much what counts as sent is ahead of what arrives.
UNSENT = 1 << 17
STALLED_MS = 120_000  # of what is sent and not acknowledged: the peer is gone


class Sparse(logging.Filter):
    """Lets the 1st, 2nd, 4th, 8th, ... line through: nobody fills this user's disk."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += 1
        return self.count & (self.count - 1) == 0


logger = logging.getLogger("uvicorn.error.public")
sparse = Sparse()
logger.addFilter(sparse)


@dataclass
class Listener:
    """Serves an application on a socket that the world can reach."""

    config: uvicorn.Config  # Of the server that serves the local socket
    state: ServerState
    app: App
    app_state: dict[str, Any]
    max_connections: int = MAX_CONNECTIONS
    max_per_host: int = MAX_PER_HOST
    hosts: Counter[str] = field(default_factory=Counter)  # Open connections

    async def listen(self, door: socket.socket) -> asyncio.Server:
        """Serve from here on."""
        self.config = copy.copy(self.config)
        self.config.loaded_app = self.app
        self.config.h11_max_incomplete_event_size = MAX_HEADERS
        self.config.ws_protocol_class = None
        door.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            door.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            door.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        loop = asyncio.get_running_loop()
        assert self.config.ssl is not None, "the public socket is never without TLS"
        return await loop.create_server(
            lambda: Request(self), sock=door, ssl=self.config.ssl,
            ssl_handshake_timeout=HANDSHAKE_S, backlog=128,
        )  # fmt: skip

    def admit(self, host: str) -> bool:
        """Count a connection; tell whether there is room for it."""
        if self.hosts.total() >= self.max_connections or self.hosts[host] >= self.max_per_host:
            return False
        self.hosts[host] += 1
        return True

    def release(self, host: str) -> None:
        """Forget a connection that has ended."""
        self.hosts[host] -= 1
        if not self.hosts[host]:
            del self.hosts[host]


class Request(H11Protocol):
    """uvicorn's HTTP/1.1, strict, with a limit to headers and to the time they take."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener.config, listener.state, listener.app_state)
        self.logger, self.access_log = logger, False
        self._listener, self._host = listener, ""
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        host = str((transport.get_extra_info("peername") or ("unknown",))[0])
        if self._listener.admit(host):
            self._host = host
            self._watch_headers()
        else:
            logger.warning("refused a connection: too many")
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._host:
            return
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        if self._host:
            self._listener.release(self._host)
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        """Give the peer some seconds for the headers of its next request."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
