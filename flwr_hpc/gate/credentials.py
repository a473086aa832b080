"""Who may come in from outside: the sites of a run, what they show, and who is out again.

One file of the run directory, mode 0600. The server's commands write it; the gate reads it again
whenever it has changed, so that a site is out as soon as it is revoked.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr_hpc.files import publish, read_json


@dataclass(frozen=True)
class Credential:
    """What one site shows."""

    token_sha256: str  # The token itself is in the invitation alone
    public_key: str  # Of its SuperNode, PEM
    public_ssh: str  # The same, for Flower's command
    node_id: int = 0  # What Flower calls its SuperNode; 0: not registered yet
    revoked: bool = False
    settings: str = ""  # sha256 of the run's settings that its invitation brought


def sha256(token: str) -> str:
    """Return what is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_credentials(path: Path) -> dict[str, Credential]:
    """Return the credentials by site; none if there is no such file yet."""
    raw = read_json(path) or {}
    return {site: Credential(**fields) for site, fields in raw.items()}


def write_credentials(path: Path, credentials: Mapping[str, Credential]) -> None:
    """Publish the credentials, for this user alone."""
    raw = {site: asdict(credential) for site, credential in credentials.items()}
    publish(path, json.dumps(raw, indent=1))


class Guests:
    """The sites that may come in, as the file says now.

    Parameters
    ----------
    path : Path
        Of the credentials.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._by_key: dict[str, str] = {}
        self._by_token: dict[str, tuple[str, Credential]] = {}
        self._revoked: frozenset[str] = frozenset()

    def revoked(self) -> frozenset[str]:
        """Return the sites that are out."""
        self._read()
        return self._revoked

    def site_of_key(self, public_key: bytes) -> str | None:
        """Return the site whose SuperNode has this public key (PEM), unless it is revoked."""
        self._read()
        return self._by_key.get(public_key.decode("ascii", "replace").strip())

    def site_of_token(self, token: str) -> str | None:
        """Return the site that was given this token, unless it is revoked."""
        found = self._with_token(token)
        return found[0] if found else None

    def folder_of_token(self, token: str) -> str | None:
        """Return the one folder of the exchange that the token's site may write to."""
        found = self._with_token(token)
        return f"node-{found[1].node_id}" if found and found[1].node_id else None

    def site_of_folder(self, folder: str) -> str | None:
        """Return the site whose folder of the exchange this is."""
        self._read()
        found = (site for site, c in self._by_token.values() if f"node-{c.node_id}" == folder)
        return next(found, None)

    def _with_token(self, token: str) -> tuple[str, Credential] | None:
        self._read()
        digest = sha256(token)
        found = self._by_token.get(digest)
        same = found is not None and hmac.compare_digest(found[1].token_sha256, digest)
        return found if same else None

    def _read(self) -> None:
        try:
            status = self._path.stat()
            stamp = status.st_mtime_ns, status.st_ino, status.st_size
            if stamp == self._stamp:
                return
            credentials = read_credentials(self._path)
        except (OSError, ValueError, TypeError):  # none, or no longer to be read: nobody comes in
            self._stamp, self._by_key, self._by_token = None, {}, {}
            return
        self._revoked = frozenset(site for site, c in credentials.items() if c.revoked)
        valid = {site: c for site, c in credentials.items() if not c.revoked}
        self._by_key = {c.public_key.strip(): site for site, c in valid.items()}
        self._by_token = {c.token_sha256: (site, c) for site, c in valid.items()}
        self._stamp = stamp
