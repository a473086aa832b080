"""What a message refers to in place of arrays: a payload of a store, or several as shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord

from flwr_hpc.exchange.shards.cuts import Cut, Joined, Sliced, slice_layout
from flwr_hpc.exchange.shards.manifest import Manifest, Shard
from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.tensors import BadPayload, Layout, Tensors

MANIFEST = "manifest"  # key in the record of one that has shards


@dataclass(frozen=True)
class Part:
    """A payload, and what of the tensors is in it; None: all."""

    ref: Reference
    cut: Cut | None = None

    def of(self, whole: Tensors | None) -> Tensors | None:
        """Return the same part of tensors."""
        return whole if whole is None or self.cut is None else Sliced(whole, self.cut)

    def layout(self, whole: Layout | None) -> Layout | None:
        """Describe the payload's tensors, given all."""
        return whole if whole is None or self.cut is None else slice_layout(whole, self.cut)


@dataclass(frozen=True)
class Parcel:
    """Payloads of one sender, relative to one version."""

    parts: Sequence[Part]
    layout: Layout | None = None  # Of the whole, as the sender says of shards

    @property
    def base(self) -> str:
        """Version that they are relative to, if any."""
        return self.parts[0].ref.base

    @property
    def dtype(self) -> str:
        """Of the floats in them, where they are in half precision."""
        return self.parts[0].ref.dtype

    def to_record(self) -> ConfigRecord:
        """Return what a message carries."""
        if self.parts[0].cut is None:
            return self.parts[0].ref.to_record()
        shards = [Shard(part.ref.sha256, part.ref.bytes, part.cut or {}) for part in self.parts]
        text = Manifest(self.layout or {}, shards, self.base).to_json()
        return ConfigRecord({MANIFEST: text, "dtype": self.dtype})

    @classmethod
    def from_record(cls, record: object, folder: str) -> Parcel:
        """Read what another site sent; BadPayload if it is anything else.

        Shards lie in `folder` of the store; of a single payload that is not checked.
        """
        if not isinstance(record, ConfigRecord) or MANIFEST not in record:
            return cls([Part(Reference.from_record(record))])
        text, dtype = record[MANIFEST], record.get("dtype", "")
        if not (isinstance(text, str) and isinstance(dtype, str)):
            raise BadPayload("a manifest of shards must be text, and so must its dtype")
        manifest = Manifest.from_json(text)
        parts = [
            Part(Reference.of(folder, s.sha256, s.bytes, manifest.base, dtype), s.rows)
            for s in manifest.shards
        ]
        return cls(parts, manifest.layout)


def joined(parts: Sequence[tuple[Tensors, Cut | None]], layout: Layout) -> Tensors:
    """Put parts together; BadPayload unless they make up exactly the whole."""
    first, cut = parts[0]
    return first if cut is None else Joined([(tensors, c or {}) for tensors, c in parts], layout)
