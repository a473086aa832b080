"""The store of a server that is reached over the network alone, by its one port."""

from __future__ import annotations

import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import IO

from flwr_hpc.clock import Clock
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.http_client.connection import Connection, Credential
from flwr_hpc.exchange.http_client.download import download
from flwr_hpc.exchange.http_client.upload import upload
from flwr_hpc.exchange.store import Reference, Store
from flwr_hpc.exchange.tensorfile import sha256_of
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Transfer
from flwr_hpc.files import draft

PIECE = 1 << 20  # bytes copied at a time


class HttpsStore(Store):
    """A server's store as a site sees it: the server's payloads, and its own.

    Parameters
    ----------
    url : str
        ``https://host:port``.
    credential : Path or None
        The JSON file with ``token`` and ``certificate`` that lets the site in.
    stall_s : float
        A transfer of which nothing has moved for so long is given up.
    clock : Clock or None
    """

    def __init__(
        self,
        url: str,
        credential: Path | None = None,
        stall_s: float = 300.0,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(url)
        self._credential, self._stall_s, self._clock = credential, stall_s, clock

    @cached_property
    def _connection(self) -> Connection:
        if self._credential is None:
            raise UserError(
                f"exchange.store={self.url}: a server lets no one in without a credential. It "
                "comes with the invitation; join with: python -m flwr_hpc.join INVITATION"
            )
        credential = Credential.read(self._credential)
        return Connection(self.url, credential, self._stall_s, self._clock)

    def check(self) -> None:
        _ = self._connection

    def put(self, path: Path, folder: str = "shared", sha256: str | None = None) -> Reference:
        ref = Reference.of(folder, sha256 or sha256_of(path), path.stat().st_size)
        upload(self._connection, path, ref, Transfer())
        return ref

    def announce(self, size: int) -> None:
        headers = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}

        def attempt() -> None:
            with self._connection.request("PUT", "own", headers):
                pass

        self._connection.persist(attempt, Transfer())

    def get(
        self, ref: Reference, target: Path, *, own: bool = False, transfer: Transfer | None = None
    ) -> None:
        transfer = transfer or Transfer()
        size = self._connection.persist(lambda: self.size(ref), transfer)
        self.check_size(ref, size)
        with draft(target, durable=not own) as temporary:
            download(self._connection, ref, target.parent, temporary, transfer)

    def size(self, ref: Reference) -> int | None:
        try:
            with self._connection.request("HEAD", ref.key) as response:
                return int(response.headers["Content-Length"])
        except BadPayload:
            return None

    def open(self, ref: Reference) -> IO[bytes]:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        with self._connection.request("GET", ref.key) as response:
            shutil.copyfileobj(response.raw, copy, PIECE)
        copy.seek(0)
        return copy

    def delete(self, ref: Reference) -> None:
        self._forget(ref.key)

    def sweep(self) -> None:
        self._forget("own")

    def _forget(self, key: str) -> None:
        def attempt() -> None:
            with self._connection.request("DELETE", key):
                pass

        self._connection.persist(attempt, Transfer())
