"""The site's half of the exchange, used by the thin ClientApp: no torch, little memory."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.records import RecordTensors, inline
from flwr_hpc.exchange.store import PREFIX, SHA256, Reference, Store
from flwr_hpc.exchange.tensorfile import TensorFile, save, sha256_of
from flwr_hpc.exchange.tensors import BadPayload, Tensors
from flwr_hpc.protocol import STATUS

INLINE = "inline-"  # begins the names of files whose arrays came inside a message


@dataclass(frozen=True)
class SiteExchange:
    """Turns the arrays of messages into files and back."""

    store: Store
    codec: Codec
    inline_below_mb: float = 1.0

    def receive(self, content: RecordDict, key: str, folder: Path) -> Path | None:
        """Write the arrays of a message to a verified safetensors file.

        Parameters
        ----------
        content : RecordDict
            Of the message.
        key : str
            Of the arrays in it.
        folder : Path
            Where the file goes, under the sha256 of what was sent.

        Returns
        -------
        Path or None
            The file; None if the message carries no such arrays.

        Raises
        ------
        BadPayload
            If the payload is missing, or not what the message says.
        OSError
            If it cannot be read or written.
        """
        if (found := content.get(PREFIX + key)) is not None:
            return self._fetch(Reference.from_record(found), folder)
        record = content.get(key)
        if not isinstance(record, ArrayRecord) or not record:
            return None
        with _scratch(folder) as unnamed:
            sha256 = save(RecordTensors(record), unnamed)
            return unnamed.rename(folder / f"{INLINE}{sha256}.safetensors")

    def send(
        self,
        content: RecordDict,
        key: str,
        weights: Path,
        sha256: str,
        owner: str = "",
        base: Path | None = None,
    ) -> None:
        """Add a file of weights to a message, as a reference or, if small, inline.

        Parameters
        ----------
        content : RecordDict
            Of the message; changed.
        key : str
            For the arrays in it.
        weights : Path
            A published safetensors file, which must not be written to again.
        sha256 : str
            Of that file.
        owner : str
            Folder in the store; default: the facility that the content's status names. Folders
            keep sites apart, since the server deletes what it has received.
        base : Path or None
            What `receive` made of the weights that the site started from, where it still is.

        Raises
        ------
        BadPayload
            If the file is malformed or, sent inline, not what `sha256` says.
        """
        if weights.stat().st_size >= self.inline_below_mb * 1e6:
            folder = f"from-{owner or _facility(content)}"
            content[PREFIX + key] = self._put(weights, sha256, folder, base).to_record()
            return
        if (found := sha256_of(weights)) != sha256:
            raise BadPayload(f"{weights.name} has the sha256 {found}, expected {sha256}")
        content[key] = inline(TensorFile(weights, sha256))

    def _fetch(self, ref: Reference, folder: Path) -> Path:
        path = folder / f"{ref.sha256}.safetensors"
        if path.is_file():  # as when an order is sent again
            path.touch()  # in use again: not to be pruned
            return path
        with _scratch(folder) as payload:
            self.store.get(ref, payload)
            save(self.codec.decode(payload), path)
        return path

    def _put(self, weights: Path, sha256: str, folder: str, base: Path | None) -> Reference:
        known = self._base(base)
        with _scratch(weights.parent) as payload:
            digest = self.codec.encode(TensorFile(weights, sha256), payload, known)
            ref = self.store.put(payload, folder, digest)
        return Reference(ref.key, ref.sha256, ref.bytes, base.stem if base and known else "")

    def _base(self, path: Path | None) -> Tensors | None:
        """Open what the server knows by the name of its file, if the codec wants it."""
        if path is None or not self.codec.relative or not SHA256.fullmatch(path.stem):
            return None
        return TensorFile(path) if path.is_file() else None


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield a name that is gone after the block."""
    path = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _facility(content: RecordDict) -> str:
    status = content.get(STATUS)
    fields = json.loads(str(status["json"])) if isinstance(status, ConfigRecord) else {}
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(fields.get("facility") or "site"))
