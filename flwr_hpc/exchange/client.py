"""The site's half of the exchange, used by the thin ClientApp: no torch, little memory."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import ArrayRecord, RecordDict

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.compression.feedback import Feedback
from flwr_hpc.exchange.executors import in_threads
from flwr_hpc.exchange.records import RecordTensors, inline
from flwr_hpc.exchange.shards.cuts import Cut
from flwr_hpc.exchange.shards.manifest import WeightFiles, check_sha256
from flwr_hpc.exchange.shards.parcel import Parcel, Part, cut_out, joined
from flwr_hpc.exchange.store import AT_ONCE, PREFIX, SHA256, Reference, Store, node_folder
from flwr_hpc.exchange.tensorfile import TensorFile, save
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
            A published safetensors file, or the manifest of shards, which travel as they are; none
            of it must be written to again.
        sha256 : str
            Of that file or manifest.
        node_id : int
            This node's, by which the server knows what it may fetch, and delete afterwards.
        base : Path or None
            What `receive` made of the weights that the site started from, where it still is.
        order_id : str
            Of the order that these are the trained weights of.

        Returns
        -------
        dict
            ``sent_share``: the payloads' bytes as a share of the files'. ``codec_error``: the norm
            of what the codec left out, as a share of the update's.

        Raises
        ------
        BadPayload
            If a file is malformed or, of what is sent inline, not what `sha256` says.
        """
        trained = WeightFiles.open(weights, sha256)
        if trained.nbytes >= self.inline_below_mb * 1e6:
            parcel, metrics = self._put(trained, node_folder(node_id), base, order_id)
            content[PREFIX + key] = parcel.to_record()
            return metrics
        for file, _ in trained.parts:
            check_sha256(file.path, file.sha256)
        content[key] = inline(trained.whole)
        return {}

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
        self, trained: WeightFiles, folder: str, base: Path | None, order_id: str
    ) -> tuple[Parcel, dict[str, float]]:
        """Put files of weights into the store, each as a payload of its own."""
        known = self._base(base)
        feedback = self.feedback if known else None
        meant = feedback.corrected(order_id, trained.whole) if feedback else trained.whole
        version = base.stem if base and known else ""
        with ExitStack() as stack:
            payloads: list[tuple[Path, str]] = []
            sent: list[tuple[Tensors, Cut | None]] = []
            for file, cut in trained.parts:
                payload = stack.enter_context(_scratch(file.path.parent))
                part = file if meant is trained.whole else cut_out(meant, cut)
                there = cut_out(known, cut) if known else None
                payloads.append((payload, self.codec.encode(part, payload, there)))
                if feedback:
                    sent.append((self.codec.decode(payload, there, file.layout), cut))
            size = sum(path.stat().st_size for path, _ in payloads)
            metrics = {"sent_share": size / trained.nbytes}
            if feedback and known:
                whole = joined(sent, trained.whole.layout)
                metrics["codec_error"] = feedback.keep(order_id, meant, whole, known)
            self.store.announce(size)
            refs = in_threads(lambda p: self.store.put(p[0], folder, p[1]), payloads, AT_ONCE)
        dtype = _half(trained.whole)
        parts = [
            Part(replace(ref, base=version, dtype=dtype), cut)
            for ref, (_, cut) in zip(refs, trained.parts, strict=True)
        ]
        return Parcel(parts, trained.whole.layout), metrics

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
