"""No rank outlives another: one TCP connection per rank to rank 0, watched by a thread.

A blocked collective notices a lost peer late or, on CUDA, only by its time-out. The kernel
closes the sockets of a killed process at once, and keep-alive probes find a lost node; so the
end of such a connection without a goodbye ends this process.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

GOODBYE = b"."
FAREWELL_S = 10.0  # for the peers to leave as well
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # lost node: 25 s


class RankError(RuntimeError):
    """What went wrong on a rank, in its own words; `fatal`: trying again will not fix it."""

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class LoneFailureError(RankError):
    """One rank failed, and the others wait for it elsewhere."""


class Lifeline:
    """Watches connected sockets, one per peer; ends the process when a peer is lost.

    Parameters
    ----------
    peers : dict of int to socket
        Rank of the peer and the connection to it.
    on_lost : callable
        Called with the lost rank from the watching thread; default: message and exit.
    """

    def __init__(
        self, peers: dict[int, socket.socket], on_lost: Callable[[int], None] | None = None
    ) -> None:
        self._peers = peers
        self._on_lost = on_lost or _exit
        self._closed = False
        for connection in peers.values():
            _keep_alive(connection)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    if not _said_goodbye(key.fileobj) and not self._closed:
                        self._on_lost(key.data)

    def close(self) -> None:
        """Leave in order: the peers do not count this rank as lost."""
        self._closed = True
        for connection in self._peers.values():
            try:
                connection.sendall(GOODBYE)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # the peer has left before
        self._thread.join(FAREWELL_S)


def _said_goodbye(connection: Any) -> bool:
    try:
        return bool(connection.recv(1) == GOODBYE)
    except OSError:
        return False


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not every system has all three
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _exit(rank: int) -> None:
    end_process(f"rank {rank} of this allocation is gone; ending")


def end_process(message: str) -> None:
    """End at once: the interpreter's own way out waits for collectives that never end."""
    print(message, file=sys.stderr, flush=True)
    os._exit(75)
