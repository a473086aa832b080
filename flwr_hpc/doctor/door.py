"""What the checks of the line to a server ask of it and of this host, so that tests can answer."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flwr_hpc.config.invitation import Invitation, versions
from flwr_hpc.exchange.http_client.connection import Connection, Credential
from flwr_hpc.exchange.http_client.download import download
from flwr_hpc.exchange.http_client.upload import upload
from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.tensorfile import sha256_of
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Transfer
from flwr_hpc.join import server_door

MB = 1_000_000
SMALL, LARGE = 2 * MB, 50 * MB  # bytes that are sent and fetched: the second where that is quick
QUICK_S, STALL_S = 1.0, 20.0
PROXIES = ("https_proxy", "http_proxy", "no_proxy", "all_proxy")


@dataclass(frozen=True)
class Rates:
    """How fast payloads travel."""

    up_mb_s: float  # to the server
    down_mb_s: float


class Door:
    """The real server, from this host.

    Parameters
    ----------
    invitation : Invitation
    """

    def __init__(self, invitation: Invitation) -> None:
        self._invitation = invitation

    def environment(self) -> Mapping[str, str]:
        """Return what the environment says of proxies, by its name in small letters."""
        found = {name: os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES}
        return {name: value for name, value in found.items() if value}

    def proxy(self) -> str:
        """Return the proxy that connections to the server go through; empty if none."""
        return server_door.proxy(self._invitation.address)

    def knock(self) -> server_door.Answer:
        """Return what the server answers; OSError or HTTPException if it does not."""
        return server_door.knock(self._invitation)

    def versions(self) -> dict[str, str]:
        """Return what is installed here."""
        return versions()

    def rates(self, folder: str) -> Rates:
        """Send a payload to the site's own folder of the exchange and fetch it; it is removed."""
        rates = self._rates(folder, SMALL)
        quick = SMALL / MB / min(rates.up_mb_s, rates.down_mb_s) < QUICK_S
        return self._rates(folder, LARGE) if quick else rates

    def _rates(self, folder: str, size: int) -> Rates:
        own = self._invitation
        credential = Credential(own.token, own.certificate)
        connection = Connection(f"https://{own.address}", credential, STALL_S)
        with tempfile.TemporaryDirectory(prefix="flwr-hpc-") as name:
            payload, back = Path(name) / "payload", Path(name) / "back"
            payload.write_bytes(secrets.token_bytes(size))  # nothing that compresses on the way
            ref = Reference.of(folder, sha256_of(payload), size)
            try:
                up_s = _timed(lambda: upload(connection, payload, ref, Transfer()))
                down_s = _timed(lambda: download(connection, ref, Path(name), back, Transfer()))
            finally:
                with suppress(OSError, BadPayload), connection.request("DELETE", ref.key):
                    pass
        return Rates(size / MB / up_s, size / MB / down_s)


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return max(time.monotonic() - began, 1e-6)
