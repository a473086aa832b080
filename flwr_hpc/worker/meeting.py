"""Where an allocation's ranks meet: rank 0 keeps values for them, and a connection to each.

Other users' processes reach the port as ours do, and torch's `TCPStore` asks nobody who he is. Who
could write there would be sent the ranks' connections, who may only read would learn where they
listen. So each end of a connection proves here that it knows a secret of this start of the job,
which lies in a file of this user alone; the secret itself never travels, and a process that took
over the port of a rank 0 that died learns nothing and is believed nothing.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

import psutil

SECRET_BYTES = 32
HANDSHAKE_S = 10.0  # a stranger who says nothing is sent away after that
BACKLOG = 1024  # all ranks of a large job come at once

Address = tuple[str, int]


def listening_address(nodes: int) -> str:
    """Return the one address of this node that all ranks of its job reach.

    The loopback interface for a job of one node, which is there even where no network is; else
    that of the interface that gloo was told to use, else what this node's name stands for.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    if nodes == 1:
        return "127.0.0.1"
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if name:
        found = [a.address for a in psutil.net_if_addrs().get(name, ()) if _is_inet(a.family)]
        problem = f"GLOO_SOCKET_IFNAME={name}: this node has no such interface with an address"
    else:
        host = socket.gethostname()
        found = [str(a[4][0]) for a in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        found = [address for address in found if not _ip(address).is_loopback]
        problem = f"the name of this node, {host}, stands for no address that other nodes reach"
    if not found:
        raise RuntimeError(f"{problem}. Name the interface: env.GLOO_SOCKET_IFNAME of the facility")
    # Addresses of one link alone, which some resolvers list too, come last.
    return str(min(found, key=lambda a: _ip(a).is_link_local))


def _ip(address: str) -> IPv4Address | IPv6Address:
    return ip_address(address.partition("%")[0])  # without the name of an interface


def _is_inet(family: int) -> bool:
    return family in (socket.AF_INET, socket.AF_INET6)


class Host:
    """Rank 0's side: lets those in who know the secret.

    Parameters
    ----------
    address : str
        To listen on.
    secret : bytes
    """

    def __init__(self, address: str, secret: bytes) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._door = socket.create_server((address, 0), family=family, backlog=BACKLOG)
        self._secret = secret
        self._values: dict[bytes, bytes] = {}
        self._peers: dict[int, socket.socket] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._welcome, name="meeting", daemon=True).start()

    @property
    def address(self) -> Address:
        name = self._door.getsockname()
        return str(name[0]), int(name[1])

    def peers(self, world_size: int, timeout_s: float) -> dict[int, socket.socket]:
        """Return a connection to every other rank, which nothing has been said on yet.

        Raises
        ------
        TimeoutError
            If some do not come.
        """
        others = set(range(1, world_size))
        with self._changed:
            if not self._changed.wait_for(lambda: others <= set(self._peers), timeout_s):
                missing = sorted(others - set(self._peers))
                raise TimeoutError(f"ranks {missing} did not start in {timeout_s:.0f} s")
            return dict(self._peers)

    def _welcome(self) -> None:
        while True:
            try:
                connection, _ = self._door.accept()
            except OSError:  # too many open files: ours come again
                time.sleep(0.1)
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(HANDSHAKE_S)
            if not _admit(connection, self._secret):
                raise PermissionError("not one of ours")
            purpose, *words = _receive(connection)
            connection.settimeout(None)
            if purpose == b"peer":
                with self._changed:
                    self._peers[int(words[0])] = connection
                    self._changed.notify_all()
                return
            while True:
                _send(connection, *self._answer(*_receive(connection)))
        except OSError:  # gone, too slow, or not one of ours
            connection.close()

    def _answer(self, verb: bytes, *words: bytes) -> Sequence[bytes]:
        values = self._values
        with self._changed:
            match verb, *words:
                case b"wait", seconds, *keys:
                    here = self._changed.wait_for(
                        lambda: values.keys() >= set(keys), float(seconds)
                    )
                    return [b"1", *(values[key] for key in keys)] if here else []
                case b"check", *keys:
                    return [b"1"] if values.keys() >= set(keys) else []
                case b"delete", key:
                    return [b"1"] if values.pop(key, None) is not None else []
                case (b"count",):
                    return [b"%d" % len(values)]
                case b"set", *pairs:
                    values |= zip(pairs[::2], pairs[1::2], strict=True)
                    answer = []
                case b"add", key, number:
                    values[key] = b"%d" % (int(values.get(key, b"0")) + int(number))
                    answer = [values[key]]
                case b"append", key, value:
                    values[key] = values.get(key, b"") + value
                    answer = []
                case b"compare_set", key, expected, value:
                    if values.get(key, b"") == expected:
                        values[key] = value
                    answer = [values.get(key, expected)]
                case _:
                    raise ConnectionError(f"no such question: {verb!r}")
            self._changed.notify_all()
            return answer


class Values:
    """A rank's view of the values that rank 0 keeps; any number of threads may ask.

    Parameters
    ----------
    address : tuple of str and int
    secret : bytes
    """

    def __init__(self, address: Address, secret: bytes) -> None:
        self._address, self._secret = address, secret
        self._idle: list[socket.socket] = []

    def ask(self, verb: str, *words: bytes) -> list[bytes]:
        """Return rank 0's answer; each thread that waits for one has a connection of its own."""
        connection = self._idle.pop() if self._idle else self.connect("values")
        try:
            _send(connection, verb.encode(), *words)
            answer = _receive(connection)
        except OSError:
            connection.close()
            raise
        self._idle.append(connection)
        return answer

    def connect(self, *purpose: str) -> socket.socket:
        """Return a connection to rank 0 on which both ends have shown that they know the secret.

        Raises
        ------
        OSError
            If rank 0 is not there, or whoever is there does not know it.
        """
        connection = socket.create_connection(self._address, timeout=HANDSHAKE_S)
        try:
            if not _introduce(connection, self._secret):
                raise PermissionError(f"another process listens at {self._address}")
            _send(connection, *(word.encode() for word in purpose))
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            connection.close()
            raise
        return connection


def proof(secret: bytes, *of: bytes) -> bytes:
    """Return what only those can say of something who know the secret."""
    return hmac.digest(
        secret, b"".join(struct.pack("!I", len(part)) + part for part in of), "sha256"
    )


def _admit(connection: socket.socket, secret: bytes) -> bool:
    """Rank 0's half of the handshake; False: the other end does not know the secret."""
    ours = os.urandom(SECRET_BYTES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(ours)
    theirs, said = _exactly(connection, SECRET_BYTES), _exactly(connection, SECRET_BYTES)
    if not hmac.compare_digest(said, proof(secret, b"guest", ours, theirs)):
        return False
    connection.sendall(proof(secret, b"host", theirs, ours))
    return True


def _introduce(connection: socket.socket, secret: bytes) -> bool:
    """The other half."""
    theirs, ours = _exactly(connection, SECRET_BYTES), os.urandom(SECRET_BYTES)
    connection.sendall(ours + proof(secret, b"guest", theirs, ours))
    said = _exactly(connection, SECRET_BYTES)
    return hmac.compare_digest(said, proof(secret, b"host", ours, theirs))


def _send(connection: socket.socket, *words: bytes) -> None:
    sizes = struct.pack(f"!I{len(words)}Q", len(words), *(len(word) for word in words))
    connection.sendall(sizes + b"".join(words))


def _receive(connection: socket.socket) -> list[bytes]:
    (count,) = struct.unpack("!I", _exactly(connection, 4))
    sizes = struct.unpack(f"!{count}Q", _exactly(connection, 8 * count))
    return [_exactly(connection, size) for size in sizes]


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise ConnectionError("the other end has gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
