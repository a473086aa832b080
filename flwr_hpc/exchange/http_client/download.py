"""A payload from the server, in ranges."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

from flwr_hpc.exchange.http_client.connection import Connection
from flwr_hpc.exchange.resumable import download as resumable
from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Transfer

KEPT = 1 << 17  # bytes after which what has come is written: a cut costs no more


def download(
    connection: Connection, ref: Reference, folder: Path, target: Path, transfer: Transfer
) -> None:
    """Fetch a payload into `target`, and check it; what there is of it in `folder` counts.

    BadPayload if it is not what the reference says, OSError if it cannot be had or written.
    """

    def read(first: int, end: int) -> Generator[bytes, None, None]:
        headers = {"Range": f"bytes={first}-{end - 1}"}
        with connection.request("GET", ref.key, headers) as response:
            expected = f"bytes {first}-{end - 1}/{ref.bytes}"
            if response.headers.get("Content-Range") != expected:
                raise BadPayload(f"the server sends other bytes of {ref.key} than asked")
            yield from response.raw.stream(KEPT, decode_content=False)

    def persist(attempt: Callable[[resumable.Read], None], transfer: Transfer) -> None:
        connection.persist(lambda: attempt(read), transfer)

    resumable.download(persist, ref, folder, target, transfer, connection.clock.wall)
