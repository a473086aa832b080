"""Versions on their way to the sites: encoded once, in the store while they may be fetched.

A published version stays there while it is the newest of its key, while a node has not answered
a message that refers to it (the last few per node, so that nodes that never answer pin nothing for
ever), or while the next one is to be sent as an update of it. One that is pushed again later is put
again.
"""

from __future__ import annotations

import copy
import gc
import uuid
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import ArrayRecord, Message, RecordDict

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.records import LazyArray, RecordTensors, source_of
from flwr_hpc.exchange.store import GLOBAL, PREFIX, Reference, Store
from flwr_hpc.exchange.tensorfile import TensorFile, save
from flwr_hpc.exchange.tensors import BadPayload, Layout, Tensors
from flwr_hpc.protocol import ARRAYS

FEW = 4  # unanswered payloads that count, per node


@dataclass(frozen=True)
class _Published:
    """A payload in the store."""

    ref: Reference
    weights: TensorFile  # The version, as the strategy made it
    received: Tensors  # What sites make of the payload


class Publisher:
    """Replaces the arrays in messages by references, in one thread.

    Where `downlink` leaves something out, a site trains from other weights than the strategy
    thinks. It sends its update of those, which `version` has added to the strategy's own: what was
    left out is not lost, but part of the next version's difference from what the site has.

    Parameters
    ----------
    store : Store
    codec : Codec
        For versions that are sent whole.
    folder : Path
        For its own files.
    inline_below : float
        Records of fewer bytes stay in the message.
    downlink : Codec or None
        For updates of the version that a node answered last; None: all are sent whole.
    """

    def __init__(
        self,
        store: Store,
        codec: Codec,
        folder: Path,
        inline_below: float,
        downlink: Codec | None = None,
    ) -> None:
        self._store = store
        self._codec = codec
        self._folder = folder
        self._inline_below = inline_below
        self._downlink = downlink
        self._published: dict[str, _Published] = {}  # by version
        # Versions by the base that each was encoded against.
        self._payloads: weakref.WeakKeyDictionary[TensorFile, dict[str, str]] = (
            weakref.WeakKeyDictionary()
        )
        self._newest: dict[str, str] = {}  # version that was published last, by key
        self._unanswered: dict[int, deque[str]] = defaultdict(lambda: deque(maxlen=FEW))
        self._held: dict[int, str] = {}  # version of the weights that a node answered last

    def encode(self, message: Message) -> Message:
        """Return the message with references for its arrays; the caller's stays as it is."""
        if not message.has_content() or not message.content.array_records:
            return message
        content = RecordDict()
        for key, record in message.content.items():
            if isinstance(record, ArrayRecord) and (ref := self._publish(record, key, message)):
                content[PREFIX + key] = ref.to_record()
            else:
                content[key] = record
        changed = copy.copy(message)  # shares the metadata, where Flower notes the id
        changed.content = content
        return changed

    def answered(self, sent: Message, well: bool = True) -> None:
        """Note that a node has what a message refers to; not `well`: that it may have nothing."""
        node = sent.metadata.dst_node_id
        if not well:
            self._held.pop(node, None)
        for name, record in sent.content.items():
            if not name.startswith(PREFIX):
                continue
            version = Reference.from_record(record).version
            if version in self._unanswered[node]:
                self._unanswered[node].remove(version)
            if well and self._downlink and name == PREFIX + ARRAYS:
                self._held[node] = version

    def prune(self) -> None:
        """Delete what nobody has to fetch any more."""
        needed = {*self._newest.values(), *self._held.values()}.union(*self._unanswered.values())
        for version in self._published.keys() - needed:
            self._store.delete(self._published.pop(version).ref)

    def version(self, name: str) -> Tensors:
        """Return the weights that a node's update is relative to; BadPayload if they are gone."""
        if (found := self._published.get(name)) is None:
            raise BadPayload(f"relative to the version {name}, which is not published any more")
        return found.weights

    def close(self) -> None:
        """Delete what is published; no message may be on its way any more."""
        for published in self._published.values():
            self._store.delete(published.ref)
        self._published.clear()

    def _publish(self, record: ArrayRecord, key: str, message: Message) -> Reference | None:
        """Put a record into the store and make it lazy; None if it is to stay inline."""
        try:
            tensors = RecordTensors(record)
        except BadPayload:  # not weights as we know them: Flower carries it as it is
            return None
        if tensors.nbytes < self._inline_below or not record:
            return None
        file, node = self._file_of(record, tensors), message.metadata.dst_node_id
        ref = self._put(file, self._base_at(node, file.layout) if key == ARRAYS else "")
        self._newest[key] = ref.version
        self._unanswered[node].append(ref.version)
        return ref

    def _file_of(self, record: ArrayRecord, tensors: Tensors) -> TensorFile:
        """Return the file a record stands for, and write it first if there is none."""
        source = source_of(record)
        if isinstance(source, TensorFile) and source.in_place:
            return source
        file = self._write(tensors)
        for name in record:
            record[name] = LazyArray(file, name)
        gc.collect()  # Flower's records are in cycles: old replies would keep their files
        return file

    def _base_at(self, node: int, layout: Layout) -> str:
        """Return the version that a node has, if weights of a layout may be sent as its update."""
        held = self._held.get(node, "")
        if held not in self._published:
            return ""
        there = self._published[held].received.layout
        same = {n: i.shape for n, i in there.items()} == {n: i.shape for n, i in layout.items()}
        return held if same else ""

    def _put(self, file: TensorFile, base: str) -> Reference:
        """Have a file's payload in the store, encoded once for all sites that have its base."""
        versions = self._payloads.setdefault(file, {})
        if published := self._published.get(versions.get(base, "")):
            return published.ref
        payload = self._new_path()
        try:
            received, sha256 = self._encoded(file, payload, base)
            ref = replace(self._store.put(payload, GLOBAL, sha256), base=base)
        finally:
            payload.unlink(missing_ok=True)
        versions[base] = ref.version
        self._published[ref.version] = _Published(ref, file, received)
        return ref

    def _encoded(self, file: TensorFile, payload: Path, base: str) -> tuple[Tensors, str]:
        """Write a payload; return what sites make of it, and its sha256."""
        there = self._published[base].received if base else None
        codec = self._downlink if there and self._downlink else self._codec
        sha256 = codec.encode(file, payload, there)
        if self._downlink is None or sha256 == file.sha256:
            return file, sha256
        return self._write(codec.decode(payload, there, file.layout)), sha256

    def _write(self, tensors: Tensors) -> TensorFile:
        """Write a file of our own, which goes with the last array over it."""
        path = self._new_path()
        file = TensorFile(path, save(tensors, path))
        weakref.finalize(file, path.unlink, missing_ok=True)
        return file

    def _new_path(self) -> Path:
        return self._folder / uuid.uuid4().hex
