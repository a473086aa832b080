"""Versions on their way to the sites: encoded once, in the store while they may be fetched.

A published version stays there while it is the newest of its key, or while a node has not answered
a message that refers to it (the last few per node, so that nodes that never answer pin nothing for
ever). One that is pushed again later is put again.
"""

from __future__ import annotations

import copy
import gc
import uuid
import weakref
from collections import defaultdict, deque
from pathlib import Path

from flwr.app import ArrayRecord, Message, RecordDict

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.records import LazyArray, RecordTensors, source_of
from flwr_hpc.exchange.store import GLOBAL, PREFIX, Reference, Store
from flwr_hpc.exchange.tensorfile import TensorFile, save
from flwr_hpc.exchange.tensors import BadPayload, Tensors

FEW = 4  # unanswered payloads that count, per node


class Publisher:
    """Replaces the arrays in messages by references, in one thread.

    Parameters
    ----------
    store : Store
    codec : Codec
    folder : Path
        For its own files.
    inline_below : float
        Records of fewer bytes stay in the message.
    """

    def __init__(self, store: Store, codec: Codec, folder: Path, inline_below: float) -> None:
        self._store = store
        self._codec = codec
        self._folder = folder
        self._inline_below = inline_below
        self._published: dict[str, Reference] = {}  # by sha256
        self._payloads: weakref.WeakKeyDictionary[TensorFile, Reference] = (
            weakref.WeakKeyDictionary()
        )
        self._newest: dict[str, str] = {}  # sha256 of what was published last, by key
        self._unanswered: dict[int, deque[str]] = defaultdict(lambda: deque(maxlen=FEW))

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

    def answered(self, sent: Message) -> None:
        """Note that a node has what a message refers to."""
        waiting = self._unanswered[sent.metadata.dst_node_id]
        for name, record in sent.content.items():
            if name.startswith(PREFIX) and (sha256 := str(record.get("sha256"))) in waiting:
                waiting.remove(sha256)

    def prune(self) -> None:
        """Delete what nobody has to fetch any more."""
        awaited = set().union(*self._unanswered.values())
        for sha256 in list(self._published):
            if sha256 not in awaited and sha256 not in self._newest.values():
                self._store.delete(self._published.pop(sha256))

    def reference(self, sha256: str) -> Reference:
        """Return a payload that is published; BadPayload if it is not."""
        if sha256 not in self._published:
            raise BadPayload(f"relative to the version {sha256}, which is not published any more")
        return self._published[sha256]

    def close(self) -> None:
        """Delete what is published; no message may be on its way any more."""
        for ref in self._published.values():
            self._store.delete(ref)
        self._published.clear()

    def _publish(self, record: ArrayRecord, key: str, message: Message) -> Reference | None:
        """Put a record into the store and make it lazy; None if it is to stay inline."""
        try:
            tensors = RecordTensors(record)
        except BadPayload:  # not weights as we know them: Flower carries it as it is
            return None
        if tensors.nbytes < self._inline_below or not record:
            return None
        ref = self._put(self._file_of(record, tensors))
        self._newest[key] = ref.sha256
        self._unanswered[message.metadata.dst_node_id].append(ref.sha256)
        return ref

    def _file_of(self, record: ArrayRecord, tensors: Tensors) -> TensorFile:
        """Return the file a record stands for, and write it first if there is none."""
        source = source_of(record)
        if isinstance(source, TensorFile) and source.in_place:
            return source
        path = self._new_path()
        file = TensorFile(path, save(tensors, path))
        weakref.finalize(file, path.unlink, missing_ok=True)
        for name in record:
            record[name] = LazyArray(file, name)
        gc.collect()  # Flower's records are in cycles: old replies would keep their files
        return file

    def _put(self, file: TensorFile) -> Reference:
        """Have a file's payload in the store, encoded once for all sites."""
        ref = self._payloads.get(file)
        if ref is None or ref.sha256 not in self._published:
            payload = self._new_path()
            try:
                sha256 = self._codec.encode(file, payload)
                ref = self._store.put(payload, GLOBAL, sha256)
            finally:
                payload.unlink(missing_ok=True)
            self._payloads[file] = self._published[ref.sha256] = ref
        return ref

    def _new_path(self) -> Path:
        return self._folder / uuid.uuid4().hex
