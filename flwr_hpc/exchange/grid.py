"""A Flower Grid that sends weights as references and gives them back as lazy records.

Strategies know nothing of it. What it keeps on disk, it gives back by itself:

- A published version stays in the store while it is the newest of its key, or while a node has not
  answered a message that refers to it (the last few per node, so that nodes that never answer
  pin nothing for ever). One that is pushed again later is put again.
- A reply's payload is deleted from the store as soon as it is fetched; the fetched file, when
  the last lazy array over it is gone.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import uuid
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    RecordDict,
)
from flwr.serverapp import Grid

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.records import LazyArray, RecordTensors, lazy_record, source_of
from flwr_hpc.exchange.store import PREFIX, Reference, Store
from flwr_hpc.exchange.tensorfile import TensorFile, save
from flwr_hpc.exchange.tensors import BadPayload, Layout, Tensors, check
from flwr_hpc.protocol import ARRAYS, ORDER, STATUS, WEIGHT_KEY, Order, from_json

GLOBAL = "global"  # the server's folder in the store
REJECTED = 1000  # code of the error that a bad reply becomes
TTL_S = 30 * 86400.0  # a job may queue for days; deadlines are the strategy's business
FEW = 4  # unanswered payloads that count, per node
SLACK = 33 << 20  # bytes a payload may have beyond its tensors (the table of contents)


class ExchangeGrid(Grid):
    """Wraps a Grid; publishes arrays on push, loads and checks them on pull.

    Parameters
    ----------
    grid : Grid
        Flower's.
    store : Store
        This run's alone.
    codec : Codec
        What the bytes of payloads are, on both ways.
    folder : Path
        For this object's own files and emptied by it; on the store's file system, if that is
        local, so that nothing is copied.
    inline_below_mb : float
        Smaller records stay in the message.
    emit : callable
        Told ``order_rejected`` with facility, order_id and reason.

    Attributes
    ----------
    rejected : int
        Replies refused so far.
    """

    def __init__(
        self,
        grid: Grid,
        store: Store,
        codec: Codec,
        folder: Path,
        *,
        inline_below_mb: float = 1.0,
        emit: Callable[..., object] = lambda event, **fields: None,
    ) -> None:
        self.rejected = 0
        self._grid = grid
        self._store = store
        self._folder = folder
        self._codec = codec
        self._inline_below = inline_below_mb * 1e6
        self._emit = emit
        self._published: dict[str, Reference] = {}  # by sha256
        self._payloads: weakref.WeakKeyDictionary[TensorFile, Reference] = (
            weakref.WeakKeyDictionary()
        )
        self._newest: dict[str, str] = {}  # sha256 of what was published last, by key
        self._unanswered: dict[int, deque[str]] = defaultdict(lambda: deque(maxlen=FEW))
        self._sent: dict[str, Message] = {}  # by message id, without the arrays
        self._layouts: dict[tuple[int | None, str], Layout] = {}  # by node and key
        folder.mkdir(parents=True, exist_ok=True)
        for remains in folder.iterdir():  # of a killed session
            remains.unlink()

    def expect(self, arrays: ArrayRecord, key: str) -> None:
        """Say what replies must look like from nodes that nothing was pushed to yet.

        A resumed run collects orders of the session before it.
        """
        self._layouts[None, key] = RecordTensors(arrays).layout

    def close(self) -> None:
        """Delete what is published; no message may be on its way any more."""
        for ref in self._published.values():
            self._store.delete(ref)
        self._published.clear()

    # --- Grid -----------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Pass on."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Pass on."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Pass on."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push, with arrays published first; see `Grid.push_messages`."""
        encoded = self._encode_all(messages)
        ids = list(self._grid.push_messages(encoded))
        for message_id, message in zip(ids, encoded, strict=False):
            self._remember(message_id, message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull, with arrays checked and lazy; a bad reply becomes an error message."""
        return [self._accept(reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull until all have answered or `timeout` seconds are over."""
        encoded = self._encode_all(messages)
        replies = list(self._grid.send_and_receive(encoded, timeout=timeout))
        for message in encoded:
            self._remember(message.metadata.message_id, message)
        return [self._accept(reply) for reply in replies]

    # --- push -----------------------------------------------------------------------------

    def _encode_all(self, messages: Iterable[Message]) -> list[Message]:
        encoded = [self._encode(message) for message in messages]
        self._prune()
        return encoded

    def _encode(self, message: Message) -> Message:
        message.metadata.ttl = TTL_S
        if not message.has_content() or not _has_arrays(message.content):
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

    def _publish(self, record: ArrayRecord, key: str, message: Message) -> Reference | None:
        """Put a record into the store and make it lazy; None if it is to stay inline."""
        node = message.metadata.dst_node_id
        try:
            tensors = RecordTensors(record)
        except BadPayload:  # not weights as we know them: Flower carries it as it is
            return None
        if not _is_part(message, key):
            self._layouts[node, key] = tensors.layout
        if tensors.nbytes < self._inline_below or not record:
            return None
        ref = self._put(self._file_of(record, tensors))
        self._newest[key] = ref.sha256
        self._unanswered[node].append(ref.sha256)
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

    def _prune(self) -> None:
        awaited = set().union(*self._unanswered.values())
        for sha256 in list(self._published):
            if sha256 not in awaited and sha256 not in self._newest.values():
                self._store.delete(self._published.pop(sha256))

    def _remember(self, message_id: str | None, message: Message) -> None:
        if message_id:
            stub = copy.copy(message)
            stub.content = RecordDict(
                {k: r for k, r in message.content.items() if isinstance(r, ConfigRecord)}
            )
            self._sent[message_id] = stub

    def _new_path(self) -> Path:
        return self._folder / uuid.uuid4().hex

    # --- pull -----------------------------------------------------------------------------

    def _accept(self, reply: Message) -> Message:
        node = reply.metadata.src_node_id
        sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
        if sent is not None:
            self._answered(sent)
        if not reply.has_content():
            return reply
        try:
            self._decode(reply.content, node, _order_in(sent))
        except (BadPayload, OSError) as exc:
            return self._reject(reply, sent, str(exc))
        return reply

    def _answered(self, sent: Message) -> None:
        waiting = self._unanswered[sent.metadata.dst_node_id]
        for name, record in sent.content.items():
            if name.startswith(PREFIX) and (sha256 := str(record.get("sha256"))) in waiting:
                waiting.remove(sha256)

    def _decode(self, content: RecordDict, node: int, order: Order | None) -> None:
        """Replace references by lazy records, in place."""
        for name, record in list(content.items()):
            if name.startswith(PREFIX):
                key = name.removeprefix(PREFIX)
                del content[name]
                layout = self._layout(node, key, order)
                content[key] = self._fetch(Reference.from_record(record), layout)
            elif isinstance(record, ArrayRecord) and record:
                tensors = RecordTensors(record)
                check(tensors, self._layout(node, name, order))
                if any(info.dtype == "BF16" for info in tensors.layout.values()):
                    content[name] = lazy_record(tensors)
        if _has_arrays(content):
            _check_weight(content)

    def _fetch(self, ref: Reference, layout: Layout | None) -> ArrayRecord:
        try:
            _check_size(ref, layout)
            tensors = self._open(ref, self._base(ref.base))
        except BadPayload:
            self._discard(ref)  # else the same bytes would be found there for ever
            raise
        self._discard(ref)
        check(tensors, layout)
        return lazy_record(tensors, layout)

    def _open(self, ref: Reference, base: Tensors | None = None) -> Tensors:
        """Fetch a payload; its file goes with the last array over it."""
        path = self._new_path()
        try:
            self._store.get(ref, path)
            tensors = self._codec.decode(path, base)
        except BadPayload:
            path.unlink(missing_ok=True)
            raise
        weakref.finalize(tensors, path.unlink, missing_ok=True)
        return tensors

    def _base(self, sha256: str) -> Tensors | None:
        """Return a version as the sites have it: decoded from what was published."""
        if not sha256 or not self._codec.relative:
            return None
        if sha256 not in self._published:
            raise BadPayload(f"relative to the version {sha256}, which is not published any more")
        return self._open(self._published[sha256])

    def _discard(self, ref: Reference) -> None:
        if ref.folder != GLOBAL:
            self._store.delete(ref)

    def _layout(self, node: int, key: str, order: Order | None) -> Layout | None:
        """Return what a reply's arrays must look like, by what was sent and asked for."""
        whole = self._layouts.get((node, key)) or self._layouts.get((None, key))
        if whole is None or key != ARRAYS or order is None or order.returns is None:
            return whole
        return {name: whole[name] for name in order.returns if name in whole}

    def _reject(self, reply: Message, sent: Message | None, reason: str) -> Message:
        self.rejected += 1
        facility, order_id = _names(reply)
        self._emit("order_rejected", facility=facility, order_id=order_id, reason=reason)
        if sent is None:  # not asked for by us: enough of a message to answer to
            meta = reply.metadata
            sent = Message(RecordDict(), meta.src_node_id, meta.message_type)
        return Message(Error(REJECTED, f"reply refused: {reason}"), reply_to=sent)


def _order_in(message: Message | None) -> Order | None:
    """Return the order that a message of ours submits or asks for."""
    record = message.content.get(ORDER) if message is not None else None
    return from_json(Order, str(record["json"])) if isinstance(record, ConfigRecord) else None


def _is_part(message: Message, key: str) -> bool:
    """Whether a record holds some of the weights only: replies are not to look like it."""
    order = _order_in(message)
    return key == ARRAYS and order is not None and order.merges is not None


def _has_arrays(content: RecordDict) -> bool:
    return any(isinstance(record, ArrayRecord) for record in content.values())


def _check_size(ref: Reference, layout: Layout | None) -> None:
    """Refuse a payload that could only fill the disk."""
    if layout is not None:
        limit = SLACK + sum(8 * info.size for info in layout.values())
        if ref.bytes > limit:
            raise BadPayload(f"payload has {ref.bytes} bytes, expected {limit} at most")


def _check_weight(content: RecordDict) -> None:
    """Refuse weights of a reply that would spoil the average."""
    for metrics in content.metric_records.values():
        value = metrics.get(WEIGHT_KEY, 1)
        if isinstance(value, list) or not math.isfinite(value) or value < 0:
            raise BadPayload(f"{WEIGHT_KEY} is {value}, expected a finite number >= 0")


def _names(reply: Message) -> tuple[str, str]:
    """Return facility and order id, as far as the reply tells."""
    facility, order_id = str(reply.metadata.src_node_id), ""
    for key in (ORDER, STATUS):
        record = reply.content.get(key)
        try:
            told = json.loads(str(record["json"])) if isinstance(record, ConfigRecord) else {}
            facility = str(told.get("facility") or facility)
            order_id = str(told.get("order_id") or order_id)
        except (KeyError, ValueError, AttributeError):
            continue
    return facility, order_id
