"""What a site sent, made into checked lazy records. Runs beside the server's loop, in many threads.

Taken is what was asked for, from the sender's own folder of the store, of the size that the layout
implies, and as a copy of the server's own: nothing can change between the check and the use. Of
shards none is fetched unless they make up the whole, and each is checked by itself.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import BoundedSemaphore

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.executors import in_threads
from flwr_hpc.exchange.expected import Expected
from flwr_hpc.exchange.records import RecordTensors, lazy_record
from flwr_hpc.exchange.shards.parcel import Parcel, Part, joined
from flwr_hpc.exchange.store import AT_ONCE, PREFIX, Reference, Store
from flwr_hpc.exchange.tensors import (
    FLOATS,
    HALVES,
    LOOK,
    BadPayload,
    Layout,
    Tensors,
    check,
    check_layout,
)
from flwr_hpc.exchange.transfer import Linked, Transfer
from flwr_hpc.protocol import METRICS, WEIGHT_KEY

DISK_SHARE = 0.5  # of what is free: a payload whose layout is not known may take so much


class Receiver:
    """Fetches and checks replies.

    Parameters
    ----------
    store : Store
    codec : Codec
    folder : Path
        For fetched payloads; a file goes with the last lazy array over it.
    version : callable
        ``version(name)``: the weights that an update is relative to.
    memory : int
        Bytes that checking takes, of however many replies at the same time.
    """

    def __init__(
        self,
        store: Store,
        codec: Codec,
        folder: Path,
        version: Callable[[str], Tensors],
        memory: int,
    ) -> None:
        self._store = store
        self._codec = codec
        self._folder = folder
        self._version = version
        looks = min(len(os.sched_getaffinity(0)), memory // LOOK)
        self._turn = BoundedSemaphore(max(1, looks))

    def take(self, content: RecordDict, expected: Expected, transfer: Transfer) -> RecordDict:
        """Return what was asked for of a reply; BadPayload or OSError if that is not good."""
        self._drop_unasked(content, expected)
        taken = {key: record for key, record in content.items() if _plain(key, record)}
        for key, layout in expected.layouts.items():
            if PREFIX + key in content:
                parcel = Parcel.from_record(content[PREFIX + key], expected.folder)
                taken[key] = self._fetch(parcel, layout, expected, transfer)
            elif isinstance(record := content.get(key), ArrayRecord) and record:
                taken[key] = self._inline(record, layout, transfer)
        _check_weight(taken.get(METRICS))
        return RecordDict(taken)

    def _inline(
        self, record: ArrayRecord, layout: Layout | None, transfer: Transfer
    ) -> ArrayRecord:
        tensors = RecordTensors(record)
        check(tensors, layout, (*HALVES, *self._codec.dtypes), transfer.advance, self._turn)
        half = any(info.dtype == "BF16" for info in tensors.layout.values())
        return lazy_record(tensors) if half else record

    def _fetch(
        self, parcel: Parcel, layout: Layout | None, expected: Expected, transfer: Transfer
    ) -> ArrayRecord:
        for part in parcel.parts:
            if part.ref.folder != expected.folder:
                raise BadPayload(
                    f"payload {part.ref.key} is another's: its own lie in {expected.folder}/"
                )
        accept = (*self._codec.dtypes, *([parcel.dtype] if parcel.dtype else []))
        try:
            tensors = self._fetch_parts(parcel, layout, accept, transfer)
        except BadPayload:
            self._delete(parcel)  # else the same bytes would be found there for ever
            raise
        self._delete(parcel)
        return lazy_record(tensors, layout)

    def _fetch_parts(
        self, parcel: Parcel, layout: Layout | None, accept: tuple[str, ...], transfer: Transfer
    ) -> Tensors:
        """Return the tensors of payloads; none is fetched unless all of them can be right."""
        if parcel.layout is not None and layout is not None:
            check_layout(parcel.layout, layout, FLOATS)  # before the codec; each part is checked
        self._check_sizes(parcel, layout, accept)
        base = self._version(parcel.base) if parcel.base and self._codec.relative else None
        linked = Linked(transfer)
        with ExitStack() as refused:

            def fetch(part: Part) -> Tensors:
                expected = part.layout(parcel.layout if layout is None else layout)
                path = self._folder / uuid.uuid4().hex
                refused.callback(path.unlink, missing_ok=True)
                tensors = self._open(part.ref, path, part.of(base), expected, linked)
                check(tensors, expected, accept, linked.advance, self._turn)
                if part.cut is not None:  # they are many
                    tensors.let_go()
                return tensors

            found = in_threads(fetch, parcel.parts, AT_ONCE, linked.cancel)
            cuts = (part.cut for part in parcel.parts)
            whole = joined(list(zip(found, cuts, strict=True)), layout or parcel.layout or {})
            refused.pop_all()
        return whole

    def _open(
        self,
        ref: Reference,
        path: Path,
        base: Tensors | None,
        layout: Layout | None,
        transfer: Transfer,
    ) -> Tensors:
        """Fetch a payload as our own copy; its file goes with the last array over it."""
        self._store.get(ref, path, own=True, transfer=transfer)
        tensors = self._codec.decode(path, base, layout)
        weakref.finalize(tensors, path.unlink, missing_ok=True)
        return tensors

    def _check_sizes(self, parcel: Parcel, layout: Layout | None, accept: tuple[str, ...]) -> None:
        """Refuse payloads that cannot be what was asked for, and could only fill the disk."""
        if layout is None:
            room = int(DISK_SHARE * shutil.disk_usage(self._folder).free)
            _check_size(sum(part.ref.bytes for part in parcel.parts), 1, room)
            return
        for part in parcel.parts:
            _check_size(part.ref.bytes, *self._codec.size_range(part.layout(layout) or {}, accept))

    def _delete(self, parcel: Parcel) -> None:
        for part in parcel.parts:
            self._store.delete(part.ref)

    def _drop_unasked(self, content: RecordDict, expected: Expected) -> None:
        """Have the store rid of payloads of the sender's that nobody will fetch."""
        for name, record in content.items():
            if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in expected.layouts:
                try:
                    parcel = Parcel.from_record(record, expected.folder)
                except BadPayload:
                    continue
                if all(part.ref.folder == expected.folder for part in parcel.parts):
                    self._delete(parcel)


def _check_size(found: int, low: int, high: int) -> None:
    if not low <= found <= high:
        raise BadPayload(f"the payload has {found} bytes, expected {low} to {high}")


def _plain(key: str, record: object) -> bool:
    """Whether a record is one that every reply may have, and Flower's strategies one of."""
    return key == METRICS or (isinstance(record, ConfigRecord) and not key.startswith(PREFIX))


def _check_weight(metrics: object) -> None:
    """Refuse weights of a reply that would spoil the average."""
    if metrics is None:
        return
    if not isinstance(metrics, MetricRecord):
        raise BadPayload(f"'{METRICS}' is a {type(metrics).__name__}, expected a MetricRecord")
    value = metrics.get(WEIGHT_KEY, 1)
    if isinstance(value, list) or not math.isfinite(value) or value < 0:
        raise BadPayload(f"{WEIGHT_KEY} is {value}, expected a finite number >= 0")
