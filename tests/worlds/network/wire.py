"""What tests run on two hosts to measure the line between them; imports nothing of ours.

``sink PORT`` prints what came and its hash, ``send HOST PORT BYTES [PAUSE_S]`` sends it,
``echo PORT`` answers UDP, ``ping HOST PORT COUNT WAIT_S`` prints the round trips that came about.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time

BLOCK = bytes(range(256)) * 256


def sink(port: int) -> None:
    """Take one connection's bytes."""
    with socket.create_server(("0.0.0.0", port)) as door:
        print("ready", flush=True)
        line, _ = door.accept()
        began, count, digest = time.monotonic(), 0, hashlib.sha256()
        while block := line.recv(1 << 16):
            count += len(block)
            digest.update(block)
        line.sendall(b"got it")
        spent = time.monotonic() - began
    print(json.dumps({"bytes": count, "sha256": digest.hexdigest(), "seconds": spent}))


def send(host: str, port: int, size: int, pause_s: float = 0.0) -> None:
    """Send so many bytes and wait until they were taken."""
    began, digest = time.monotonic(), hashlib.sha256()
    with socket.create_connection((host, port)) as line:
        for start in range(0, size, len(BLOCK)):
            block = BLOCK[: size - start]
            line.sendall(block)
            digest.update(block)
            time.sleep(pause_s)
        line.shutdown(socket.SHUT_WR)
        assert line.recv(16) == b"got it"
    spent = time.monotonic() - began
    print(json.dumps({"bytes": size, "sha256": digest.hexdigest(), "seconds": spent}))


def echo(port: int) -> None:
    """Answer every datagram, and print it."""
    with socket.socket(type=socket.SOCK_DGRAM) as door:
        door.bind(("0.0.0.0", port))
        print("ready", flush=True)
        while True:
            words, sender = door.recvfrom(2048)
            print(words.decode(), flush=True)
            door.sendto(words, sender)


def ping(host: str, port: int, count: int, wait_s: float) -> None:
    """Send datagrams, each after the one before was answered or given up."""
    trips = []
    with socket.socket(type=socket.SOCK_DGRAM) as line:
        line.settimeout(wait_s)
        for number in range(count):
            words, began = f"{number}".encode(), time.monotonic()
            line.sendto(words, (host, port))
            try:
                while line.recv(2048) != words:
                    pass
            except TimeoutError:
                continue
            trips.append(time.monotonic() - began)
    print(json.dumps(trips))


def main() -> None:
    word, *rest = sys.argv[1:]
    match word:
        case "sink":
            sink(int(rest[0]))
        case "send":
            send(rest[0], int(rest[1]), int(rest[2]), *map(float, rest[3:]))
        case "echo":
            echo(int(rest[0]))
        case "ping":
            ping(rest[0], int(rest[1]), int(rest[2]), float(rest[3]))


if __name__ == "__main__":
    main()
