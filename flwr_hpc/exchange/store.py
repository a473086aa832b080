"""Where payloads lie. A store is one class in `stores/`; payloads are named by their sha256.

A name says what is in the file, so that putting it twice is harmless and a reader can tell
whether it got what was meant.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord

from flwr_hpc.exchange import registry, stores
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.files import draft

PREFIX = "exchange."  # in a message, a reference to the arrays of key K lies under PREFIX + K
DEFAULT = "fsspec"  # takes every URL whose scheme no other store is named after

SHA256 = re.compile(r"[0-9a-f]{64}")
# No leading dot and one folder only: a key from another site cannot leave the store.
KEY = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,150}}/({SHA256.pattern})\.payload")


@dataclass(frozen=True)
class Reference:
    """A payload in a store, as a message carries it; BadPayload if it is not of that form."""

    key: str  # ``<folder>/<sha256>.payload``
    sha256: str  # Hex digest
    bytes: int  # Size of the file
    base: str = ""  # sha256 of the payload that it is relative to, if any

    def __post_init__(self) -> None:
        match = KEY.fullmatch(self.key)
        if not match or match[1] != self.sha256 or self.bytes < 0:
            raise BadPayload(f"not a reference to a payload: {self.key[:200]!r}")
        if self.base and not SHA256.fullmatch(self.base):
            raise BadPayload(f"not the sha256 of a payload: {self.base[:200]!r}")

    @classmethod
    def of(cls, folder: str, sha256: str, size: int) -> Reference:
        """Name a payload in a folder of the store."""
        return cls(f"{folder}/{sha256}.payload", sha256, size)

    @property
    def folder(self) -> str:
        """Whose payload it is."""
        return self.key.split("/")[0]

    def to_record(self) -> ConfigRecord:
        """Return what a message carries."""
        return ConfigRecord(dict(vars(self)))

    @classmethod
    def from_record(cls, record: object) -> Reference:
        """Read what another site sent; BadPayload if it is anything else."""
        if not isinstance(record, ConfigRecord):
            raise BadPayload("a reference to a payload must be a ConfigRecord")
        key, sha256, size = (record.get(k) for k in ("key", "sha256", "bytes"))
        if not (isinstance(key, str) and isinstance(sha256, str) and isinstance(size, int)):
            raise BadPayload("a reference to a payload lacks key, sha256 or bytes")
        return cls(key, sha256, size, str(record.get("base", "")))


class Store(ABC):
    """A place for payloads that the server and all sites reach.

    Parameters
    ----------
    url : str
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def check(self) -> None:  # noqa: B027 - most need nothing
        """Raise a UserError if this machine lacks what it takes to reach the place."""

    @abstractmethod
    def put(self, path: Path, folder: str = "shared", sha256: str | None = None) -> Reference:
        """Store a file under the name of its content; again is harmless.

        The file must not be written to again: it may be linked and not copied. OSError if the
        place cannot be written to, or is full.

        Parameters
        ----------
        path : Path
            A published file.
        folder : str
            Groups payloads by who puts and deletes them.
        sha256 : str or None
            Of the file, if known.
        """

    def get(self, ref: Reference, target: Path) -> None:
        """Fetch a payload, verify it, and let it appear at `target` whole.

        BadPayload if it is not there or not what the reference says; OSError if it cannot be
        read, or `target` not written.
        """
        size = self.size(ref)
        if size is None:
            raise BadPayload(f"payload {ref.key} is not in the store {self.url}")
        if size != ref.bytes:
            raise BadPayload(f"payload {ref.key} has {size} bytes, expected {ref.bytes}")
        with draft(target) as temporary:
            digest = self.fetch(ref, temporary)
            if digest != ref.sha256:
                raise BadPayload(f"payload {ref.key} has the sha256 {digest}")

    @abstractmethod
    def size(self, ref: Reference) -> int | None:
        """Return the bytes of a payload as it lies there, None if it does not."""

    @abstractmethod
    def fetch(self, ref: Reference, target: Path) -> str:
        """Copy or link a payload to `target`; return the sha256 of what came."""

    @abstractmethod
    def delete(self, ref: Reference) -> None:
        """Remove a payload; one that is gone already is no error."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove all payloads, such as a killed session leaves behind, and nothing else.

        Only for the one who owns the store, while no message refers into it.
        """


def store_names() -> list[str]:
    """Return the stores that are there."""
    return registry.names(stores)


def make_store(url: str) -> Store:
    """Return the store that ``exchange.store`` names: by the scheme of the URL, else fsspec's."""
    scheme = url.partition("://")[0] if "://" in url else ""
    own = scheme in store_names() or "." in scheme
    made: Store = registry.find("exchange.store", scheme if own else DEFAULT, stores, Store)(url)
    return made
