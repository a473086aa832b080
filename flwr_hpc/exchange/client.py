"""The site's half of the exchange, used by the thin ClientApp: no torch, little memory."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import ArrayRecord, RecordDict

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.executors import in_threads
from flwr_hpc.exchange.records import RecordTensors, inline
from flwr_hpc.exchange.shards.manifest import (
    SUFFIX,
    Manifest,
    Shard,
    WeightFiles,
    check_sha256,
)
from flwr_hpc.exchange.shards.parcel import Parcel, Part
from flwr_hpc.exchange.store import AT_ONCE, PREFIX, Reference, Store, node_folder
from flwr_hpc.exchange.tensorfile import TensorFile, save
from flwr_hpc.exchange.tensors import FLOATS, HALVES, BadPayload, Layout, Tensors
from flwr_hpc.spool.folders import mark_received

INLINE = "inline-"  # begins the names of files whose arrays came inside a message


@dataclass(frozen=True)
class SiteExchange:
    """Turns the arrays of messages into files and back."""

    store: Store
    codec: Codec
    inline_below_mb: float = 0.1
    downlink: Codec | None = None  # Of updates that come from the server

    def files(self, content: RecordDict, folder: Path) -> set[Path]:
        """Return what files the arrays of a message are, or are updates of, once received."""
        refs = (Reference.from_record(r) for key, r in content.items() if key.startswith(PREFIX))
        return {_file(folder, name) for ref in refs for name in (ref.version, ref.base) if name}

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
    ) -> None:
        """Add what a job has published to a message: references or, of small weights, all of them.

        Payloads travel as the job has encoded them; nothing of a large file is read.

        Parameters
        ----------
        content : RecordDict
            Of the message; changed.
        key : str
            For the arrays in it.
        weights : Path
            A published safetensors file, or the manifest of shards; none of it must be written to
            again.
        sha256 : str
            Of that file or manifest.
        node_id : int
            This node's, by which the server knows what it may fetch, and delete afterwards.

        Raises
        ------
        BadPayload
            If a file is malformed or, of what is sent inline, not what `sha256` says.
        """
        manifest = Manifest.of(weights, sha256)
        if manifest.encoded or manifest.nbytes >= self.inline_below_mb * 1e6:
            content[PREFIX + key] = self._put(weights, manifest, node_folder(node_id)).to_record()
            return
        for shard in manifest.shards:
            check_sha256(weights.parent / shard.file, shard.sha256)
        content[key] = inline(WeightFiles.open(weights, sha256).whole)

    def _fetch(self, ref: Reference, folder: Path) -> Path:
        path = _file(folder, ref.version)
        if not path.is_file():  # it is there when an order is sent again
            with _scratch(folder) as payload:
                self.store.get(ref, payload)
                received = self._decoded(ref, payload, folder)
                if isinstance(received, TensorFile) and received.path == payload:
                    payload.rename(path)  # as it is, and hashed already
                else:
                    save(received, path)
        mark_received(path)  # it may be a link to an older file: not to be pruned before its order
        return path

    def _decoded(self, ref: Reference, payload: Path, folder: Path) -> Tensors:
        if not ref.base:
            return self.codec.decode(payload)
        base = _file(folder, ref.base)
        if self.downlink is None or not base.is_file():
            raise BadPayload(f"{ref.key} is relative to version {ref.base}, which is not here")
        return self.downlink.decode(payload, TensorFile(base))

    def _put(self, weights: Path, manifest: Manifest, folder: str) -> Parcel:
        """Put files into the store, each as a payload of its own."""
        base, dtype = manifest.base, _half(manifest.layout)

        def put(shard: Shard) -> Part:
            ref = self.store.put(weights.parent / shard.file, folder, shard.sha256)
            cut = shard.rows if weights.suffix == SUFFIX else None
            return Part(replace(ref, base=base, dtype=dtype), cut)

        self.store.announce(manifest.nbytes)
        return Parcel(in_threads(put, manifest.shards, AT_ONCE), manifest.layout)


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


def _half(layout: Layout) -> str:
    """Return the half precision that floats are in, which has to be declared; else nothing."""
    dtypes = {info.dtype for info in layout.values()} & set(FLOATS)
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(HALVES) else ""
