"""Whose socket is at the other end of a connection."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flwr_hpc.errors import UserError
from flwr_hpc.gate.peers import Address, can_tell, check, owner

linux = pytest.mark.skipif(sys.platform != "linux", reason="owners are told by Linux's /proc")

ROW = "{n:4d}: {local} {remote} {state} 00000000:00000000 00:00000000 00000000 {uid:5d} 0 {inode} 1"
CLIENT, SERVER = "0100007F:C350", "0100007F:1F90"  # 127.0.0.1, 50000 and 8080
PEER, HERE = ("127.0.0.1", 50000), ("127.0.0.1", 8080)
MAPPED = "0000000000000000FFFF0000"
OPEN = {"local": CLIENT, "remote": SERVER, "state": "01", "uid": 1000, "inode": 77}


def table(folder: Path, *rows: dict[str, object], name: str = "tcp") -> Path:
    lines = ["  sl  local_address rem_address   st ...", *(ROW.format(n=1, **row) for row in rows)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@contextmanager
def connection(
    server_host: str, client_host: str, family: int
) -> Iterator[tuple[Address, Address]]:
    """Yield a server's view of a connection: the peer's address and its own."""
    kind = socket.AF_INET6 if ":" in server_host else socket.AF_INET
    dual = ":" in server_host
    with (
        socket.create_server((server_host, 0), family=kind, dualstack_ipv6=dual) as server,
        socket.socket(family) as client,
    ):
        client.connect((client_host, server.getsockname()[1]))
        accepted, peer = server.accept()
        with accepted:
            yield peer[:2], accepted.getsockname()[:2]


@linux
@pytest.mark.parametrize(
    ("server", "client", "family"),
    [
        ("127.0.0.1", "127.0.0.1", socket.AF_INET),
        ("127.0.0.1", "::ffff:127.0.0.1", socket.AF_INET6),
        ("::", "127.0.0.1", socket.AF_INET),
        ("::", "::ffff:127.0.0.1", socket.AF_INET6),
        ("::1", "::1", socket.AF_INET6),
    ],
    ids=["IPv4", "IPv4 in an IPv6 socket", "a server of both", "both", "IPv6"],
)
def test_the_kernel_names_the_owner(server: str, client: str, family: int) -> None:
    """Protects our own clients, whichever kind of socket they and the server use."""
    try:
        with connection(server, client, family) as (peer, here):
            assert owner(peer, here) == os.getuid()
    except OSError as exc:
        pytest.skip(f"no such socket on this host: {exc}")


@linux
def test_a_peer_that_hung_up_is_nobody() -> None:
    """Protects root: what is left of a closed socket reads as root's, whoever closed it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            peer = client.getsockname()
        accepted, _ = server.accept()
        with accepted:
            assert owner(peer, accepted.getsockname()) is None


def test_only_the_open_socket_of_this_connection_counts(tmp_path: Path) -> None:
    """Protects against rows of the same port: other connections, what waits to be forgotten,
    sockets that nobody has open any more."""
    others = [
        {**OPEN, "local": SERVER, "remote": CLIENT, "uid": 0},  # our own end
        {**OPEN, "remote": "0100007F:1F91", "uid": 0},  # the same port to another server
        {**OPEN, "state": "06", "uid": 0, "inode": 0},  # TIME_WAIT of the connection before
        {**OPEN, "state": "04", "uid": 0},
    ]
    assert owner(PEER, HERE, table(tmp_path, *others)) is None
    assert owner(PEER, HERE, table(tmp_path, {**OPEN, "uid": 0, "inode": 0})) is None
    assert owner(PEER, HERE, table(tmp_path, *others, OPEN)) == 1000


def test_ipv4_in_an_ipv6_socket_is_found_in_the_other_table(tmp_path: Path) -> None:
    """Protects clients on dual sockets, and mixed notations of one address."""
    both = {"local": MAPPED + CLIENT, "remote": MAPPED + SERVER}
    table(tmp_path)
    table(tmp_path, {**OPEN, **both}, name="tcp6")
    assert owner(PEER, HERE, tmp_path) == 1000
    assert owner(("::ffff:127.0.0.1", 50000), ("::ffff:127.0.0.1", 8080), tmp_path) == 1000


def test_no_list_means_nobody(tmp_path: Path) -> None:
    """Protects systems without /proc/net/tcp: nobody is taken for us."""
    assert owner(PEER, HERE, tmp_path) is None
    assert not can_tell(tmp_path)


@linux
def test_linux_can_tell() -> None:
    """Protects runs on Linux from being refused."""
    assert check(shared_host=False)


def test_where_owners_cannot_be_told_a_run_is_refused(tmp_path: Path) -> None:
    """Protects users of other systems: they learn what they would take on, and how to."""
    with pytest.raises(UserError, match=r"run code as you.*federation\.shared_host=true"):
        check(shared_host=False, proc_net=tmp_path)
    assert not check(shared_host=True, proc_net=tmp_path)
