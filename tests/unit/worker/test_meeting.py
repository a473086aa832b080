"""Where the ranks meet: who knows the secret gets in, nobody else learns or changes anything."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import psutil
import pytest
from worlds.jobs import until

from flwr_hpc.worker.meeting import SECRET_BYTES, Host, Values, listening_address, proof

SECRET, OTHER = b"a" * SECRET_BYTES, b"b" * SECRET_BYTES


@pytest.fixture
def host() -> Host:
    return Host("127.0.0.1", SECRET)


@pytest.fixture
def values(host: Host) -> Values:
    return Values(host.address, SECRET)


@pytest.fixture
def impostor() -> Iterator[tuple[str, int]]:
    """Listen as someone who took the port of a rank 0 that died, and says what it hears."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(os.urandom(SECRET_BYTES))
                heard = connection.recv(2 * SECRET_BYTES)
                connection.sendall(heard[SECRET_BYTES:])  # the guest's own proof

        threading.Thread(target=echo, daemon=True).start()
        yield server.getsockname()


def test_rank_0_listens_on_one_address(host: Host) -> None:
    """Protects against strangers on other networks of the node."""
    port = host.address[1]
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
    assert [a.ip for a in listening if a.port == port] == ["127.0.0.1"]


def test_without_the_secret_nobody_gets_in(host: Host, values: Values) -> None:
    """Protects the values: who does not know the secret is told nothing and changes nothing."""
    values.ask("set", b"key", b"hidden")
    with pytest.raises(OSError, match=r"gone|reset"):
        Values(host.address, OTHER).ask("set", b"key", b"forged")
    for said in (b"GET / HTTP/1.0\r\n\r\n" * 4, SECRET * 2, b"\xff" * 64):
        with socket.create_connection(host.address, timeout=20) as stranger:
            heard = stranger.recv(SECRET_BYTES)
            stranger.sendall(said[: 2 * SECRET_BYTES])
            heard += stranger.recv(1000)
        assert len(heard) == SECRET_BYTES, "more than a challenge"
        assert SECRET not in heard
    assert values.ask("wait", b"1", b"key") == [b"1", b"hidden"]


def test_what_one_rank_said_is_no_use_to_another(host: Host) -> None:
    """Protects against a stranger who repeats what he saw on the wire."""
    with socket.create_connection(host.address, timeout=20) as first:
        nonce = first.recv(SECRET_BYTES)
        introduction = OTHER + proof(SECRET, b"guest", nonce, OTHER)
        first.sendall(introduction)
        assert first.recv(SECRET_BYTES) == proof(SECRET, b"host", OTHER, nonce)
    with socket.create_connection(host.address, timeout=20) as again:
        again.recv(SECRET_BYTES)
        again.sendall(introduction)
        assert again.recv(1000) == b""


def test_who_took_rank_0s_port_is_not_believed(impostor: tuple[str, int]) -> None:
    """Protects ranks from running what a stranger sends them in rank 0's name."""
    with pytest.raises(PermissionError, match="another process listens"):
        Values(impostor, SECRET).connect("peer", "1")


def test_a_silent_stranger_keeps_nobody_waiting(host: Host, values: Values) -> None:
    """Protects the start of a job from connections that say nothing."""
    strangers = [socket.create_connection(host.address) for _ in range(20)]
    peers = [values.connect("peer", str(rank)) for rank in (1, 2)]
    assert sorted(host.peers(3, timeout_s=600)) == [1, 2]
    for connection in (*strangers, *peers):
        connection.close()


def test_ranks_that_do_not_come_are_named(host: Host, values: Values) -> None:
    """Protects users from a job that waits without saying for whom."""
    with values.connect("peer", "2"):
        until(lambda: host._peers)
        with pytest.raises(TimeoutError, match=r"ranks \[1, 3\]"):
            host.peers(4, timeout_s=0.1)


def test_a_waiting_rank_is_woken(values: Values) -> None:
    """Protects ranks that ask for what another one has yet to say, while a third asks on."""
    answers: list[list[bytes]] = []
    ask = ("wait", b"600", b"x", b"y")
    waiting = threading.Thread(target=lambda: answers.append(values.ask(*ask)))
    waiting.start()
    assert values.ask("check", b"x") == []
    assert values.ask("wait", b"0.01", b"x") == []
    values.ask("set", b"x", b"1", b"y", b"")
    waiting.join()
    assert answers == [[b"1", b"1", b""]]


def test_the_address_is_that_of_the_named_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects jobs of several nodes: they meet where the facility says."""
    name = next(
        n for n, a in psutil.net_if_addrs().items() if any(x.address == "127.0.0.1" for x in a)
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{name},another")
    assert listening_address(nodes=2) == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(RuntimeError, match="ib7: this node has no such interface"):
        listening_address(nodes=2)
    assert listening_address(nodes=1) == "127.0.0.1"


def test_a_name_that_means_loopback_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects jobs of several nodes from waiting for ranks that cannot reach rank 0."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(RuntimeError, match=r"localhost.*env\.GLOO_SOCKET_IFNAME"):
        listening_address(nodes=2)


def test_an_address_that_other_nodes_reach_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects jobs of several nodes whose resolver lists every address of the node."""
    listed = ["127.0.1.1", "fe80::1%eth0", "10.1.2.3", "10.9.9.9"]
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in listed]
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    assert listening_address(nodes=2) == "10.1.2.3"
