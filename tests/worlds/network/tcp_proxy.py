"""A line between two processes that a test can cut, freeze, mend and count."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress

PIECE = 1 << 14
BUFFER = 1 << 17  # bytes that the kernel may hold of what was passed on, for a cut to lose


class TcpProxy:
    """Passes bytes on between any number of connections and one port of this host.

    Parameters
    ----------
    port : int
        Where the server listens.
    connect : bool
        Be a centre's HTTP proxy: every connection begins with a ``CONNECT``, noted in `asked`.

    Attributes
    ----------
    up, down : int
        Bytes that were passed on to and from the server.
    """

    def __init__(self, port: int, connect: bool = False) -> None:
        self.up = self.down = 0
        self.asked: list[str] = []
        self._connect = connect
        self.server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._lines: list[socket.socket] = []
        self._down = False  # whether the line is
        self._cut_at: list[int] = []  # bytes in all
        self._freeze_at = float("inf")
        self._flows = threading.Event()
        self._flows.set()
        self.frozen = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, *counts: int) -> None:
        """Cut every connection whenever so many more bytes have passed."""
        at = self.up + self.down
        with self._lock:
            for count in counts:
                at += count
                self._cut_at.append(at)

    def freeze_after(self, count: int) -> None:
        """Have nothing pass after so many more bytes, until `thaw`; `frozen` says that it is so."""
        self._freeze_at = self.up + self.down + count

    def thaw(self) -> None:
        with self._lock:
            self._freeze_at = float("inf")
            self.frozen.clear()
            self._flows.set()

    def cut(self) -> None:
        """Reset every connection, and each that is tried until `mend`."""
        self._down = True
        self._reset()

    def mend(self) -> None:
        self._down = False

    def close(self) -> None:
        self._down = True
        self._listener.close()
        self._reset()

    def _reset(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
        for line in lines:
            _abort(line)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._down:
                    _abort(client)
                    continue
                if self._connect:
                    self._greet(client)
                try:
                    server = socket.create_connection(("127.0.0.1", self.server))
                except OSError:
                    _abort(client)
                    continue
                for end in (client, server):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
                with self._lock:
                    self._lines += [client, server]
                if self._down:  # meanwhile
                    self._reset()
                for ends in ((client, server, "up"), (server, client, "down")):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _greet(self, client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n") and (byte := client.recv(1)):
            head += byte
        self.asked.append(head.partition(b"\r\n")[0].decode())
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")

    def _pass(self, source: socket.socket, target: socket.socket, way: str) -> None:
        try:
            while data := source.recv(PIECE):
                self._flows.wait()
                target.sendall(data)
                if self._count(way, len(data)):
                    self._reset()
            target.shutdown(socket.SHUT_WR)
        except OSError:
            _abort(source)
            _abort(target)

    def _count(self, way: str, count: int) -> bool:
        """Count bytes, and freeze; tell whether that is where the line is to be cut."""
        with self._lock:
            setattr(self, way, getattr(self, way) + count)
            if self.up + self.down >= self._freeze_at:
                self._flows.clear()
                self.frozen.set()
            if self._cut_at and self.up + self.down >= self._cut_at[0]:
                self._cut_at.pop(0)
                return True
            return False


def _abort(line: socket.socket) -> None:
    """Close so that the other end sees an error, and wakes from its call."""
    with suppress(OSError):
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        line.close()
