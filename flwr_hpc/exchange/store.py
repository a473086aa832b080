"""Where payloads lie: any place fsspec reaches, under names made of their sha256.

A name says what is in the file, so that putting it twice is harmless and a reader can tell
whether it got what was meant.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord

from flwr_hpc.exchange.codec import sha256_of
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.files import draft

PREFIX = "exchange."  # in a message, a reference to the arrays of key K lies under PREFIX + K

# No leading dot and one folder only: a key from another site cannot leave the store.
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}/([0-9a-f]{64})\.safetensors")
PIECE = 1 << 20  # bytes moved at a time
BLOCK = 8 << 20  # bytes a remote file system may gather before it uploads


@dataclass(frozen=True)
class Reference:
    """A payload in a store, as a message carries it.

    Raises
    ------
    BadPayload
        If the key is not of that form.
    """

    key: str  # ``<folder>/<sha256>.safetensors``
    sha256: str  # Hex digest
    bytes: int  # Size of the file

    def __post_init__(self) -> None:
        match = KEY.fullmatch(self.key)
        if not match or match[1] != self.sha256 or self.bytes < 0:
            raise BadPayload(f"not a reference to a payload: {self.key[:200]!r}")

    @property
    def folder(self) -> str:
        """Whose payload it is."""
        return self.key.split("/")[0]

    def to_record(self) -> ConfigRecord:
        """Return what a message carries."""
        return ConfigRecord({"key": self.key, "sha256": self.sha256, "bytes": self.bytes})

    @classmethod
    def from_record(cls, record: object) -> Reference:
        """Read what another site sent; BadPayload if it is anything else."""
        if not isinstance(record, ConfigRecord):
            raise BadPayload("a reference to a payload must be a ConfigRecord")
        key, sha256, size = (record.get(k) for k in ("key", "sha256", "bytes"))
        if not (isinstance(key, str) and isinstance(sha256, str) and isinstance(size, int)):
            raise BadPayload("a reference to a payload lacks key, sha256 or bytes")
        return cls(key, sha256, size)


class Store:
    """A folder of payloads at an fsspec URL.

    On a local (or shared) file system payloads are hard links where that works: nothing is
    copied, so a file that was put must not be written to again.

    Parameters
    ----------
    url : str
        ``file:///path``, a plain path, ``s3://bucket/path``, ``sftp://``, ``memory://``, ...
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def _place(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # slow to import, and not needed to plan a run

        fs, root = url_to_fs(self.url)
        return fs, root.rstrip("/")

    def put(self, path: Path, folder: str = "shared", sha256: str | None = None) -> Reference:
        """Store a file under the name of its content; again is harmless.

        Parameters
        ----------
        path : Path
            A published file.
        folder : str
            Groups payloads by who puts and deletes them.
        sha256 : str or None
            Of the file, if known.

        Raises
        ------
        OSError
            If the place cannot be written to, or is full.
        """
        digest = sha256 or sha256_of(path)
        ref = Reference(f"{folder}/{digest}.safetensors", digest, path.stat().st_size)
        if self._size(ref) == ref.bytes:
            return ref
        if local := self._local(ref):
            with draft(local) as temporary:
                _link_or_copy(path, temporary)
            return ref
        fs, _ = self._place
        fs.makedirs(self._path(ref).rsplit("/", 1)[0], exist_ok=True)
        with open(path, "rb") as source, fs.open(self._path(ref), "wb", block_size=BLOCK) as f:
            shutil.copyfileobj(source, f, PIECE)
        return ref

    def get(self, ref: Reference, target: Path) -> None:
        """Fetch a payload, verify it, and let it appear at `target` whole.

        Raises
        ------
        BadPayload
            If it is not there, or not what the reference says.
        OSError
            If it cannot be read, or `target` not written.
        """
        size = self._size(ref)
        if size is None:
            raise BadPayload(f"payload {ref.key} is not in the store {self.url}")
        if size != ref.bytes:
            raise BadPayload(f"payload {ref.key} has {size} bytes, expected {ref.bytes}")
        with draft(target) as temporary:
            if local := self._local(ref):
                _link_or_copy(local, temporary)
                digest = sha256_of(temporary)
            else:
                digest = self._download(ref, temporary)
            if digest != ref.sha256:
                raise BadPayload(f"payload {ref.key} has the sha256 {digest}")

    def delete(self, ref: Reference) -> None:
        """Remove a payload; one that is gone already is no error."""
        with _gone_is_fine():
            self._place[0].rm_file(self._path(ref))

    def sweep(self) -> None:
        """Remove all payloads, such as a killed session leaves behind.

        Only for the one who owns the store, while no message refers into it.
        """
        fs, root = self._place
        with _gone_is_fine():
            fs.invalidate_cache()
            for name in fs.find(root, maxdepth=2):
                if KEY.fullmatch("/".join(str(name).split("/")[-2:])):
                    fs.rm_file(name)

    def _path(self, ref: Reference) -> str:
        return f"{self._place[1]}/{ref.key}"

    def _local(self, ref: Reference) -> Path | None:
        protocol = self._place[0].protocol
        local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
        return Path(self._path(ref)) if local else None

    def _size(self, ref: Reference) -> int | None:
        fs, _ = self._place
        fs.invalidate_cache()  # others write here too
        try:
            return int(fs.size(self._path(ref)))
        except FileNotFoundError:
            return None

    def _download(self, ref: Reference, target: Path) -> str:
        digest = hashlib.sha256()
        fs, _ = self._place
        with fs.open(self._path(ref), "rb", block_size=BLOCK) as source, open(target, "wb") as f:
            while piece := source.read(PIECE):
                f.write(piece)
                digest.update(piece)
        return digest.hexdigest()


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        return


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, a foreign owner, or no hard links here
        with open(source, "rb") as a, open(target, "wb") as b:
            shutil.copyfileobj(a, b, PIECE)
