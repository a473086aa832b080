"""Ports of this host that a test keeps for its servers."""

from __future__ import annotations

import socket


def reserve_port() -> socket.socket:
    """Return a socket that keeps a port of the loopback interface as long as it is open.

    It does not listen. With its option, a server that has it too (ours, uvicorn, sshd) may take
    the port, and take it again after a restart; nobody else is given it meanwhile.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    return kept
