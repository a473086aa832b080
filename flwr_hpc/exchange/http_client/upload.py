"""A file to the server, from where the last attempt stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr_hpc.exchange.http_client.connection import Connection
from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Interrupted, Transfer

CHUNK = 64 << 20  # bytes of a request: the server keeps what came of one that is cut
PIECE = 1 << 18  # bytes sent at a time
OFFSET = "Upload-Offset"


def upload(connection: Connection, path: Path, ref: Reference, transfer: Transfer) -> None:
    """Have a file in the server's store.

    BadPayload if it is not what the reference says, OSError if the server does not take it.
    """
    began_at = connection.persist(lambda: _announce(connection, ref), transfer)
    try:
        _send(connection, path, ref, began_at, transfer)
    except BadPayload:
        if began_at == 0:
            raise
        # What an earlier attempt left there was spoilt, as by a crash of the server's machine.
        _send(connection, path, ref, 0, transfer)


def _send(
    connection: Connection, path: Path, ref: Reference, offset: int, transfer: Transfer
) -> None:
    transfer.total, transfer.done = ref.bytes, offset
    arrived, cut = offset, False  # as the server says

    def attempt() -> None:
        nonlocal arrived, cut
        try:
            if cut:
                transfer.done = arrived = _announce(connection, ref)
            while arrived < ref.bytes:
                arrived = _send_chunk(connection, path, ref, arrived, transfer)
        except Interrupted:
            cut = True
            raise

    connection.persist(attempt, transfer, lambda: arrived)


def _announce(connection: Connection, ref: Reference) -> int:
    """Return how much of a payload the server has; OSError if it will not take it."""
    headers = {"Content-Range": f"bytes */{ref.bytes}", "Content-Length": "0"}
    with connection.request("PUT", ref.key, headers) as response:
        return _offset(response, ref)


def _send_chunk(
    connection: Connection, path: Path, ref: Reference, at: int, transfer: Transfer
) -> int:
    count = min(CHUNK, ref.bytes - at)
    headers = {"Content-Range": f"bytes {at}-{at + count - 1}/{ref.bytes}"}
    body = _Body(path, at, count, transfer)
    with connection.request("PUT", ref.key, headers, body) as response:
        return _offset(response, ref)


def _offset(response: Any, ref: Reference) -> int:
    text = str(response.headers.get(OFFSET, ""))
    if not text.isdecimal() or int(text) > ref.bytes:
        raise OSError(f"this is no server of flwr-hpc: it answers without a valid {OFFSET}")
    return int(text)


class _Body:
    """Part of a file, as a request's body of known length."""

    def __init__(self, path: Path, first: int, count: int, transfer: Transfer) -> None:
        self._path, self._first, self._count, self._transfer = path, first, count, transfer

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[bytes]:
        left = self._count
        with open(self._path, "rb") as file:
            file.seek(self._first)
            while left and (piece := file.read(min(left, PIECE))):
                yield piece
                left -= len(piece)
                self._transfer.advance(len(piece))
