"""How fast and how far away a host is, measured through the very way that weights would take.

A program there connects to a port of its own, which the control connection forwards to one here.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass

from flwr_hpc.ssh.host import SshHost

TOKEN = 32
PATIENCE_S = 60.0
CHUNK = 1 << 18
PROBE = """
import json, socket, sys, time
port, token = int(sys.argv[1]), sys.argv[2].encode()
s = socket.create_connection(("127.0.0.1", port), timeout=60)
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
s.sendall(token)
def read(n):
    while n:
        got = s.recv(min(n, 1 << 18))
        if not got:
            raise SystemExit("the connection ended")
        n -= len(got)
def timed(op, n):
    began = time.monotonic()
    s.sendall(op + n.to_bytes(8, "big"))
    if op == b"u":
        block, left = b"x" * (1 << 18), n
        while left:
            left -= s.send(block[:left])
    read(n if op == b"d" else 1)
    return time.monotonic() - began
trip = min(timed(b"u", 0) for _ in range(8))
def rate(op):
    n = 1 << 20
    while True:
        s_taken = max(1e-6, timed(op, n) - trip)
        if s_taken > 0.5 or n >= 1 << 27:
            return n / s_taken
        n = min(1 << 27, max(2 * n, int(n / s_taken)))
print(json.dumps({"trip_s": trip, "from_there": rate(b"u"), "to_there": rate(b"d")}))
"""


@dataclass(frozen=True)
class Wire:
    """What was measured."""

    trip_s: float
    from_there: float  # Bytes per second
    to_there: float


def measure(host: SshHost, python: str) -> Wire:
    """Expose a port there and measure through it."""
    token = secrets.token_hex(TOKEN // 2).encode()
    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=_serve, args=(door, token), name="wire", daemon=True).start()
        port = host.expose(int(door.getsockname()[1]))
        command = [python, "-c", PROBE, str(port), token.decode()]
        found = host.ask(command, timeout_s=PATIENCE_S)
    return Wire(*(float(found[key]) for key in ("trip_s", "from_there", "to_there")))


def _serve(door: socket.socket, token: bytes) -> None:
    """Answer the one who has the token, until he leaves."""
    while True:
        try:
            peer, _ = door.accept()
        except OSError:  # closed
            return
        with peer, suppress(OSError, EOFError):
            peer.settimeout(PATIENCE_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hmac.compare_digest(_exactly(peer, TOKEN), token):
                _answer(peer)


def _answer(peer: socket.socket) -> None:
    block = b"x" * CHUNK
    while True:
        op, n = _exactly(peer, 1), int.from_bytes(_exactly(peer, 8), "big")
        if op == b"u":
            while n:
                n -= len(_some(peer, n))
            peer.sendall(b"k")
        while n:
            n -= peer.send(block[:n])


def _exactly(peer: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        data += _some(peer, n - len(data))
    return data


def _some(peer: socket.socket, most: int) -> bytes:
    if data := peer.recv(min(most, CHUNK)):
        return data
    raise EOFError
