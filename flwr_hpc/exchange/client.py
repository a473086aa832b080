"""The site's half of the exchange, used by the thin ClientApp: no torch, little memory."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import ArrayRecord, RecordDict

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.compression.feedback import Feedback
from flwr_hpc.exchange.records import RecordTensors, inline
from flwr_hpc.exchange.store import PREFIX, SHA256, Reference, Store, node_folder
from flwr_hpc.exchange.tensorfile import TensorFile, save, sha256_of
from flwr_hpc.exchange.tensors import FLOATS, HALVES, BadPayload, Tensors

INLINE = "inline-"  # begins the names of files whose arrays came inside a message


@dataclass(frozen=True)
class SiteExchange:
    """Turns the arrays of messages into files and back."""

    store: Store
    codec: Codec
    inline_below_mb: float = 0.1
    feedback: Feedback | None = None  # Of what the codec leaves out
    downlink: Codec | None = None  # Of updates that come from the server

    def receive(self, content: RecordDict, key: str, folder: Path) -> Path | None:
        """Write the arrays of a message to a verified safetensors file.

        Parameters
        ----------
        content : RecordDict
            Of the message.
        key : str
            Of the arrays in it.
        folder : Path
            Where the file goes, under the name of the version.

        Returns
        -------
        Path or None
            The file; None if the message carries no such arrays.

        Raises
        ------
        BadPayload
            If the payload is missing, or not what the message says, or relative to a version that
            is not there any more: the server hears of it and sends the next one whole.
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
        node_id: int,
        base: Path | None = None,
        order_id: str = "",
    ) -> dict[str, float]:
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
        node_id : int
            This node's, by which the server knows what it may fetch, and delete afterwards.
        base : Path or None
            What `receive` made of the weights that the site started from, where it still is.
        order_id : str
            Of the order that these are the trained weights of.

        Returns
        -------
        dict
            ``sent_share``: the payload's bytes as a share of the file's. ``codec_error``: the norm
            of what the codec left out, as a share of the update's.

        Raises
        ------
        BadPayload
            If the file is malformed or, sent inline, not what `sha256` says.
        """
        if weights.stat().st_size >= self.inline_below_mb * 1e6:
            ref, metrics = self._put(weights, sha256, node_folder(node_id), base, order_id)
            content[PREFIX + key] = ref.to_record()
            return metrics
        if (found := sha256_of(weights)) != sha256:
            raise BadPayload(f"{weights.name} has the sha256 {found}, expected {sha256}")
        content[key] = inline(TensorFile(weights, sha256))
        return {}

    def _fetch(self, ref: Reference, folder: Path) -> Path:
        path = _file(folder, ref.version)
        if not path.is_file():  # it is there when an order is sent again
            with _scratch(folder) as payload:
                self.store.get(ref, payload)
                save(self._decoded(ref, payload, folder), path)
        path.touch()  # also where it is a link to an older file: not to be pruned before its order
        return path

    def _decoded(self, ref: Reference, payload: Path, folder: Path) -> Tensors:
        if not ref.base:
            return self.codec.decode(payload)
        base = _file(folder, ref.base)
        if self.downlink is None or not base.is_file():
            raise BadPayload(f"{ref.key} is relative to version {ref.base}, which is not here")
        return self.downlink.decode(payload, TensorFile(base))

    def _put(
        self, weights: Path, sha256: str, folder: str, base: Path | None, order_id: str
    ) -> tuple[Reference, dict[str, float]]:
        file, known = TensorFile(weights, sha256), self._base(base)
        feedback = self.feedback if known else None
        meant = feedback.corrected(order_id, file) if feedback else file
        with _scratch(weights.parent) as payload:
            digest = self.codec.encode(meant, payload, known)
            metrics = {"sent_share": payload.stat().st_size / weights.stat().st_size}
            if feedback and known:
                sent = self.codec.decode(payload, known, file.layout)
                metrics["codec_error"] = feedback.keep(order_id, meant, sent, known)
            ref = self.store.put(payload, folder, digest)
        named = replace(ref, base=base.stem if base and known else "", dtype=_half(file))
        return named, metrics

    def _base(self, path: Path | None) -> Tensors | None:
        """Open what the server knows by the name of its file, if the codec wants it."""
        if path is None or not self.codec.relative or not SHA256.fullmatch(path.stem):
            return None
        return TensorFile(path) if path.is_file() else None


def _file(folder: Path, version: str) -> Path:
    return folder / f"{version}.safetensors"


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield a name that is gone after the block."""
    path = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _half(tensors: Tensors) -> str:
    """Return the half precision that floats are in, which has to be declared; else nothing."""
    dtypes = {info.dtype for info in tensors.layout.values()} & set(FLOATS)
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(HALVES) else ""
