"""Where payloads lie. A store is one class in `stores/`; payloads are named by their sha256.

A name says what is in the file, so that putting it twice is harmless and a reader can tell
whether it got what was meant. It begins with the folder of who put it there: the server's, or that
of a node, and from a node nothing but what lies in its own is taken.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flwr.app import ConfigRecord

from flwr_hpc.exchange import registry, stores
from flwr_hpc.exchange.tensorfile import sha256_of
from flwr_hpc.exchange.tensors import HALVES, BadPayload
from flwr_hpc.exchange.transfer import Transfer, copy_exactly
from flwr_hpc.files import draft

PREFIX = "exchange."  # in a message, a reference to the arrays of key K lies under PREFIX + K
GLOBAL = "global"  # the server's folder
FOLDER = "file"  # takes plain paths
AT_ONCE = 4  # payloads of one sender that are moved at the same time
DEFAULT = "fsspec"  # takes every URL whose scheme no other store is named after

REFERENCE_TEXTS = {"key": None, "sha256": None, "base": "", "dtype": ""}
SHA256 = re.compile(r"[0-9a-f]{64}")
# No leading dot and one folder only: a key from another site cannot leave the store.
KEY = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,150}}/({SHA256.pattern})\.payload")


def node_folder(node_id: int) -> str:
    """Return the folder of a node: Flower vouches for the id, nobody for a facility's name."""
    return f"node-{node_id}"


@dataclass(frozen=True)
class Reference:
    """A payload in a store, as a message carries it; BadPayload if it is not of that form."""

    key: str  # ``<folder>/<sha256>.payload``
    sha256: str  # Hex digest
    bytes: int  # Size of the file
    base: str = ""  # Version that it is relative to, if any
    dtype: str = ""  # Of the floats in it, where they are in half precision

    def __post_init__(self) -> None:
        match = KEY.fullmatch(self.key)
        if not match or match[1] != self.sha256 or self.bytes < 0:
            raise BadPayload(f"not a reference to a payload: {self.key[:200]!r}")
        if self.base and not SHA256.fullmatch(self.base):
            raise BadPayload(f"not the name of a version: {self.base[:200]!r}")
        if self.dtype not in ("", *HALVES):
            raise BadPayload(f"dtype {self.dtype[:20]!r} cannot be declared: {', '.join(HALVES)}")

    @classmethod
    def of(cls, folder: str, sha256: str, size: int, base: str = "", dtype: str = "") -> Reference:
        """Name a payload in a folder of the store."""
        return cls(f"{folder}/{sha256}.payload", sha256, size, base, dtype)

    @property
    def version(self) -> str:
        """What its content is known by: the same update of two bases makes two versions."""
        if not self.base:
            return self.sha256
        return hashlib.sha256(f"{self.base} {self.sha256}".encode()).hexdigest()

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
        texts = [record.get(k, d) for k, d in REFERENCE_TEXTS.items()]
        size = record.get("bytes")
        if not (all(isinstance(t, str) for t in texts) and type(size) is int):
            raise BadPayload("a reference to a payload lacks key, sha256 or bytes")
        key, sha256, base, dtype = map(str, texts)
        return cls(key, sha256, size, base, dtype)


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

    def announce(self, size: int) -> None:  # noqa: B027 - most know no limit
        """Say how many bytes are about to be put; OSError if they can never be there together."""

    def get(
        self, ref: Reference, target: Path, *, own: bool = False, transfer: Transfer | None = None
    ) -> None:
        """Fetch a payload, verify it, and let it appear at `target` whole.

        BadPayload if it is not there or not what the reference says; OSError if it cannot be
        read, or `target` not written.

        Parameters
        ----------
        ref : Reference
        target : Path
        own : bool
            Make a copy that whoever put the payload cannot write to, for this process alone;
            else it may be linked, and survives a crash.
        transfer : Transfer or None
            Counts the bytes, and may end it.
        """
        self.check_size(ref, self.size(ref))
        with draft(target, durable=not own) as temporary:
            if not own and self.link(ref, temporary):
                digest = sha256_of(temporary)
            else:
                with self.open(ref) as source, open(temporary, "xb+") as f:
                    digest = copy_exactly(source, f, ref.bytes, transfer or Transfer())
            if digest != ref.sha256:
                raise BadPayload(f"payload {ref.key} has the sha256 {digest}")

    def check_size(self, ref: Reference, size: int | None) -> None:
        """Raise a BadPayload if a payload is not there, or of another size."""
        if size is None:
            raise BadPayload(f"payload {ref.key} is not in the store {self.url}")
        if size != ref.bytes:
            raise BadPayload(f"payload {ref.key} has {size} bytes, expected {ref.bytes}")

    @abstractmethod
    def size(self, ref: Reference) -> int | None:
        """Return the bytes of a payload as it lies there, None if there is no such file."""

    @abstractmethod
    def open(self, ref: Reference) -> IO[bytes]:
        """Open a payload to be read; BadPayload if it is not there, or no regular file."""

    def link(self, ref: Reference, target: Path) -> bool:
        """Have `target` be the payload itself, where that works; tell whether it does."""
        return False

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


def make_store(url: str, **options: Any) -> Store:
    """Return the store that ``exchange.store`` names: by the scheme of the URL, else fsspec's.

    Parameters
    ----------
    url : str
    **options
        ``credential`` (a file) and ``stall_s`` for a server's store; others take none.
    """
    scheme = url.partition("://")[0] if "://" in url else FOLDER
    own = scheme in store_names() or "." in scheme
    kind = registry.find("exchange.store", scheme if own else DEFAULT, stores, Store)
    made: Store = kind(url, **options)
    return made
