"""Whose socket is at the other end of a connection between two processes of this host.

The kernel lists every TCP socket with its owner in ``/proc/net/tcp`` and ``/proc/net/tcp6``; the
other end's row has the addresses of ours the other way round.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from flwr_hpc.errors import UserError

PROC_NET = Path("/proc/net")
OVERFLOW_UID = Path("/proc/sys/kernel/overflowuid")  # stands for every user without a name here
LOOKS = 3  # a row may be missed while others come and go
ESTABLISHED = "01"
UID, INODE = 3, 5  # among the words after a row's addresses and state

Address = tuple[str, int]


def owner(peer: Address, here: Address, proc_net: Path = PROC_NET) -> int | None:
    """Return the id of the user who owns the socket `peer`, connected to our socket `here`.

    None where it cannot be told: the peer is another host or network namespace, it has closed its
    end (what is left of it has no owner and reads as root's), or there is no such list.
    """
    for _ in range(LOOKS):
        for table, needle in _needles(peer, here):
            with suppress(OSError):
                data = (proc_net / table).read_bytes()  # whole: the row we need has no fixed place
                _, found, rest = data.partition(needle)
                words = rest[:200].split(maxsplit=INODE + 1)
                if found and int(words[INODE]):  # 0: nobody has it open any more
                    return int(words[UID])
    return None


def can_tell(proc_net: Path = PROC_NET) -> bool:
    """Try on a connection to ourselves whether owners can be told here."""
    with suppress(OSError):  # not Linux, then
        if os.getuid() == int(OVERFLOW_UID.read_text()):
            return False  # a user namespace that shows others' sockets as ours
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        return owner(client.getsockname(), server.getsockname(), proc_net) == os.getuid()


def check(shared_host: bool, proc_net: Path = PROC_NET) -> bool:
    """Return whether owners can be told here; refuse if not, unless the user takes that on."""
    told = can_tell(proc_net)
    if not told and not shared_host:
        raise UserError(
            f"this system does not say whose a connection is (no usable {proc_net}/tcp), so "
            "Flower's servers cannot keep other users of this host out: whoever can log in here "
            "while a run lasts could read its messages and run code as you. If nobody else can, or "
            "you trust all who can, add federation.shared_host=true (python -m flwr_hpc.gate: "
            "--shared-host). Otherwise run this on Linux, in a container or machine of your own."
        )
    return told


def _needles(peer: Address, here: Address) -> Iterator[tuple[str, bytes]]:
    """Yield each table and what the row of an open socket at the other end holds there."""
    theirs, ours = _unmapped(peer[0]), _unmapped(here[0])
    if isinstance(theirs, IPv4Address) and isinstance(ours, IPv4Address):
        yield "tcp", _needle((theirs, peer[1]), (ours, here[1]))
        theirs, ours = _mapped(theirs), _mapped(ours)  # a socket for both may speak IPv4
    yield "tcp6", _needle((theirs, peer[1]), (ours, here[1]))


def _needle(*ends: tuple[IPv4Address | IPv6Address, int]) -> bytes:
    return f" {' '.join(_hex(*end) for end in ends)} {ESTABLISHED} ".encode()


def _hex(address: IPv4Address | IPv6Address, port: int) -> str:
    """Write an address as the kernel does: in words of the host's byte order."""
    words = struct.unpack(f"={len(address.packed) // 4}I", address.packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def _unmapped(host: str) -> IPv4Address | IPv6Address:
    address = ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address


def _mapped(address: IPv4Address) -> IPv6Address:
    return IPv6Address(f"::ffff:{address}")
