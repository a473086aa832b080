"""The wide-area network: carries IP packets between the hosts' TUN devices, as badly as asked.

Run as root as ``python -I -S wan.py CONTROL``; the first line of standard input is a plan, the
input's end is the network's (unless the plan says ``keep``)::

    keep, seed
    hosts       {name: {"pid": of a process on the host, "address": "203.0.113.1",
                        "open": the TCP ports its firewall lets connections in to; null: all}}

Every host has a line to the network, with a direction ``out`` and a direction ``in``. A packet
goes out by its sender's line and in by its receiver's. Requests come one per connection to the
control socket: ``{"host": name, "out": {...}, "in": {...}}`` changes what it names of a direction
(``rate_mbit``, ``delay_s``, ``loss``, ``open``) and is answered with both directions' counters.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import selectors
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import Any

QUEUE_S = 0.2  # what waits longer for its turn is dropped, as by a router
ASKED_S = 60.0  # for a request to come: whoever asks is at work on it
AT_ONCE = 64  # packets of one host, before the others have their turn
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
SYN, ACK = 0x02, 0x10


@dataclass
class Direction:
    """One way along a line."""

    draw: random.Random
    rate_mbit: float | None = None  # None: as fast as it goes
    delay_s: float = 0.0
    loss: float = 0.0  # probability that a packet is lost
    open: bool = True  # closed: packets vanish, and nobody hears of it
    free_at: float = 0.0
    carried_bytes: int = 0
    lost_packets: int = 0

    def admit(self, size: int, now: float) -> float | None:
        """Return when a packet that comes now is at the other end; None if it is lost."""
        begin = max(now, self.free_at)
        lost = not self.open or begin - now > QUEUE_S
        if not lost:
            self.free_at = begin + (size * 8e-6 / self.rate_mbit if self.rate_mbit else 0.0)
            lost = self.draw.random() < self.loss
        if lost:
            self.lost_packets += 1
            return None
        self.carried_bytes += size
        return self.free_at + self.delay_s

    def change(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def counters(self) -> dict[str, int]:
        return {"carried_bytes": self.carried_bytes, "lost_packets": self.lost_packets}


@dataclass
class Port:
    """Where a host is connected."""

    tun: int
    process: int  # a handle of its process 1
    out: Direction
    into: Direction
    opened: frozenset[int] | None = None  # what its firewall lets connections in to; None: all

    def refuses(self, packet: bytes) -> bool:
        """Tell whether its firewall drops a packet: one that begins a TCP connection."""
        header = (packet[0] & 15) * 4
        if self.opened is None or packet[9] != socket.IPPROTO_TCP:
            return False
        begins = packet[header + 13] & (SYN | ACK) == SYN
        return begins and int.from_bytes(packet[header + 2 : header + 4]) not in self.opened


@dataclass
class Wan:
    """All ports, and the packets on their way."""

    ports: dict[bytes, Port]  # by IPv4 address
    heap: list[tuple[float, int, bytes, bool]] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def leave(self, port: Port, packet: bytes, now: float) -> None:
        """Take a packet from a host; what no host wants goes nowhere."""
        if packet[0] >> 4 != 4:
            return
        target = self.ports.get(packet[16:20])
        if target is not None and not target.refuses(packet):
            self._later(port.out.admit(len(packet), now), packet, False, now)

    def move(self, now: float) -> None:
        """Carry on with the packets whose time has come."""
        while self.heap and self.heap[0][0] <= now:
            due, _, packet, there = heapq.heappop(self.heap)
            self._go(packet, there, due)

    def wait_s(self, now: float) -> float | None:
        """Return how long nothing is to be done, if no packet comes."""
        return max(0.0, self.heap[0][0] - now) if self.heap else None

    def _later(self, due: float | None, packet: bytes, there: bool, now: float) -> None:
        if due is None:
            return
        if due > now:
            heapq.heappush(self.heap, (due, next(self.numbers), packet, there))
        else:
            self._go(packet, there, now)

    def _go(self, packet: bytes, there: bool, now: float) -> None:
        port = self.ports.get(packet[16:20])
        if port is None:  # it has gone meanwhile
            return
        if not there:
            self._later(port.into.admit(len(packet), now), packet, True, now)
            return
        with contextlib.suppress(OSError):  # its queue is full, or the host is going
            os.write(port.tun, packet)


def tun_of(pid: int) -> int:
    """Return the TUN device ``net0`` of the network namespace that a process is in."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as ours, open(f"/proc/{pid}/ns/net") as theirs:
        if libc.setns(theirs.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"the network of process {pid} cannot be entered")
        try:
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"net0", IFF_TUN | IFF_NO_PI))
        finally:
            libc.setns(ours.fileno(), CLONE_NEWNET)
    return tun


class Server:
    """Moves packets and answers requests until its plan's end, or the last host's."""

    def __init__(self, plan: dict[str, Any], control: str) -> None:
        self.names: dict[str, Port] = {}
        self.wan = Wan({})
        self.watched = selectors.DefaultSelector()
        for name, host in plan["hosts"].items():
            self.connect(name, host, plan["seed"])
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(control)
        self.door.listen()
        self.watched.register(self.door, selectors.EVENT_READ)
        if not plan["keep"]:
            self.watched.register(0, selectors.EVENT_READ)

    def connect(self, name: str, host: dict[str, Any], seed: int) -> None:
        out, into = (Direction(random.Random(f"{seed} {name} {way}")) for way in ("out", "in"))
        opened = None if host["open"] is None else frozenset(host["open"])
        port = Port(tun_of(host["pid"]), os.pidfd_open(host["pid"]), out, into, opened)
        self.names[name] = self.wan.ports[socket.inet_aton(host["address"])] = port
        self.watched.register(port.tun, selectors.EVENT_READ, (self.read, port))
        self.watched.register(port.process, selectors.EVENT_READ, (self.forget, port))

    def serve(self) -> None:
        while self.wan.ports:
            ready = self.watched.select(self.wan.wait_s(time.monotonic()))
            self.wan.move(time.monotonic())
            for key, _ in ready:
                if key.data is not None:
                    action, port = key.data
                    action(port)
                elif key.fileobj is self.door:
                    self.answer(self.door.accept()[0])
                elif not os.read(0, 4096):
                    return

    def read(self, port: Port) -> None:
        """Take what a host sends."""
        with contextlib.suppress(OSError):  # nothing more for now, or the host is going
            for _ in range(AT_ONCE):
                self.wan.leave(port, os.read(port.tun, 65536), time.monotonic())

    def forget(self, port: Port) -> None:
        """Let go of a host that has ended: an open device keeps its network alive."""
        for handle in (port.tun, port.process):
            self.watched.unregister(handle)
            os.close(handle)
        self.wan.ports = {a: p for a, p in self.wan.ports.items() if p is not port}

    def answer(self, caller: socket.socket) -> None:
        """Serve one request."""
        with caller, contextlib.suppress(OSError):
            caller.settimeout(ASKED_S)
            request = json.loads(caller.makefile().readline() or "{}")
            port = self.names[request["host"]]
            ways = {"out": port.out, "in": port.into}
            for way, direction in ways.items():
                direction.change(request.get(way, {}))
            reply = {way: direction.counters() for way, direction in ways.items()}
            caller.sendall(json.dumps(reply).encode() + b"\n")


def main() -> None:
    plan = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server = Server(plan, sys.argv[1])
    except OSError as exc:
        print(json.dumps({"error": str(exc)}), flush=True)
        return
    print(json.dumps({"up": True}), flush=True)
    server.serve()


if __name__ == "__main__":
    main()
