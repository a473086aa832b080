"""Which files make up a set of weights: a plain file, or shards and the manifest that names them.

A shard has some rows of some tensors: a safetensors file with these under the tensors' names or,
where the job that trained them has encoded them, a codec's payload. The manifest is published after
its shards. It lies beside them or, once they are payloads of a store, in the message that names
them. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr_hpc.exchange.shards.cuts import (
    Cut,
    Joined,
    Rows,
    all_rows,
    check_cuts,
    slice_layout,
)
from flwr_hpc.exchange.tensorfile import TensorFile, sha256_of
from flwr_hpc.exchange.tensors import STORED, BadPayload, Layout, TensorInfo, Tensors
from flwr_hpc.files import publish

SUFFIX = ".json"
PAYLOAD = ".payload"  # of the name of a shard that a codec has encoded
SHA256 = re.compile(r"[0-9a-f]{64}")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}|")  # In the manifest's own folder
MAX_TEXT = 8 << 20  # characters; those of 405B from 1024 ranks take 6 million
MAX_LISTS = 1 << 18  # and objects: what a character becomes in memory is bounded
MAX_SHARDS = 4096
MAX_AXES = 32


@dataclass(frozen=True)
class Shard:
    """A file, and what it holds."""

    sha256: str  # Hex digest
    bytes: int  # Size of the file
    rows: Mapping[str, Rows]  # Of each tensor
    file: str = ""  # Its name; a payload is named by its hash


@dataclass(frozen=True)
class Manifest:
    """Shards that make up tensors: BadPayload unless each row is in one of them."""

    layout: Layout  # Of the whole
    shards: Sequence[Shard]
    base: str = ""  # Version that they are relative to, if any

    def __post_init__(self) -> None:
        check_cuts([shard.rows for shard in self.shards], self.layout)

    @property
    def encoded(self) -> bool:
        """Whether the files are payloads of a codec."""
        return any(shard.file.endswith(PAYLOAD) for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        """Encode; a tensor is named once, and then by its number, and rows once for all tensors."""
        numbers = {name: i for i, name in enumerate(self.layout)}
        shards = []
        for s in self.shards:
            alike: dict[Rows, list[int]] = {}
            for name, rows in s.rows.items():
                alike.setdefault(rows, []).append(numbers[name])
            ranges = [[*rows, found] for rows, found in alike.items()]
            shards.append({"sha256": s.sha256, "bytes": s.bytes, "file": s.file, "rows": ranges})
        tensors = {name: [info.dtype, info.shape] for name, info in self.layout.items()}
        whole = {"tensors": tensors, "shards": shards, "base": self.base}
        return json.dumps(whole, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Decode what anybody may have written; BadPayload if it is not a manifest."""
        if len(text) > MAX_TEXT:
            raise BadPayload(f"a manifest of {len(text)} characters, expected {MAX_TEXT} at most")
        if (lists := text.count("[") + text.count("{")) > MAX_LISTS:
            raise BadPayload(f"a manifest of {lists} lists, expected {MAX_LISTS} at most")
        try:
            raw = json.loads(text)
            layout = {name: _info(entry) for name, entry in raw["tensors"].items()}
            if not 0 < len(raw["shards"]) <= MAX_SHARDS:
                raise ValueError(f"{len(raw['shards'])} shards, expected 1 to {MAX_SHARDS}")
            names = list(layout)
            shards = [_shard(entry, names) for entry in raw["shards"]]
            if (base := raw["base"]) != "" and not SHA256.fullmatch(base):
                raise ValueError(f"not the name of a version: {base[:80]!r}")
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as exc:
            raise BadPayload(f"not a manifest of shards: {str(exc)[:200]}") from None
        return cls(layout, shards, base)

    @classmethod
    def read(cls, path: Path, sha256: str | None = None) -> Manifest:
        """Read a file; OSError or BadPayload if there is none, or it is another one."""
        if sha256 is not None:
            check_sha256(path, sha256)
        return cls.from_json(path.read_bytes().decode(errors="replace"))

    @classmethod
    def of(cls, path: Path, sha256: str) -> Manifest:
        """Describe a published file of weights as the only shard, or read what is a manifest."""
        if path.suffix == SUFFIX:
            return cls.read(path, sha256)
        layout = TensorFile(path).layout
        shard = Shard(sha256, path.stat().st_size, all_rows(layout), path.name)
        return cls(layout, [shard])

    def write(self, path: Path) -> str:
        """Publish it beside its shards; return its sha256."""
        text = self.to_json().encode()
        publish(path, text)
        return hashlib.sha256(text).hexdigest()


@dataclass(frozen=True)
class WeightFiles:
    """Weights on the disk."""

    whole: Tensors
    parts: Sequence[tuple[TensorFile, Cut | None]]  # The files; None: all of the tensors

    @classmethod
    def open(cls, path: Path, sha256: str | None = None) -> WeightFiles:
        """Open a safetensors file, or the shards that a manifest names.

        OSError or BadPayload if that cannot be, or the manifest is not what `sha256` says; of a
        plain file that is only noted.
        """
        if path.suffix != SUFFIX:
            file = TensorFile(path, sha256)
            return cls(file, [(file, None)])
        manifest = Manifest.read(path, sha256)
        if manifest.encoded:
            raise BadPayload(f"{path.name} names payloads of a codec, which are no weights")
        layout = manifest.layout
        shards = [
            (TensorFile(path.parent / s.file, s.sha256, slice_layout(layout, s.rows)), s.rows)
            for s in manifest.shards
        ]
        return cls(Joined(shards, layout), shards)


def check_sha256(path: Path, sha256: str) -> None:
    """Raise a BadPayload if a file is another one."""
    if (found := sha256_of(path)) != sha256:
        raise BadPayload(f"{path.name} has the sha256 {found}, expected {sha256}")


def files_of(path: Path) -> list[Path]:
    """Return the files that a set of weights lies in, the manifest last."""
    if path.suffix != SUFFIX:
        return [path]
    return [*(path.parent / shard.file for shard in Manifest.read(path).shards), path]


def shard_file(path: Path, number: int, count: int) -> Path:
    """Name a shard of what would be `path` if it was a single file."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def remove_others(path: Path, kept: Path) -> None:
    """Delete what an earlier job left in place of `kept`: the plain file, or a manifest and shards.

    And what one that was killed had begun to write: nobody may be writing any of it.

    Parameters
    ----------
    path : Path
        The name of the plain file.
    kept : Path
        The plain file or the manifest that was published last.
    """
    keep = set(files_of(kept))
    stem = path.stem
    patterns = (f"{stem}-*-of-*", f".{stem}.*.tmp", f".{stem}-*-of-*.tmp")
    others = (found for pattern in patterns for found in path.parent.glob(pattern))
    for left in (path.with_suffix(SUFFIX), path, *others):
        if left not in keep:
            left.unlink(missing_ok=True)


def _info(entry: Any) -> TensorInfo:
    dtype, shape = entry
    if (
        dtype not in STORED
        or len(shape) > MAX_AXES
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
    ):
        raise ValueError(f"no tensor is {str(entry)[:80]}")
    return TensorInfo(dtype, tuple(shape))


def _shard(entry: Any, names: Sequence[str]) -> Shard:
    sha256, size, file = entry["sha256"], entry["bytes"], entry["file"]
    if not (SHA256.fullmatch(sha256) and type(size) is int and size > 0 and FILE.fullmatch(file)):
        raise ValueError(f"no shard is {sha256[:80]!r} of {str(size)[:80]} bytes in {file[:80]!r}")
    rows: dict[str, Rows] = {}
    for start, stop, numbers in entry["rows"]:
        if not all(type(n) is int and n >= 0 for n in (start, stop, *numbers)):
            raise ValueError("ranges of rows are of natural numbers")
        alike = (start, stop)
        for number in numbers:
            if number >= len(names) or names[number] in rows:
                raise ValueError(f"a shard has tensor {str(number)[:20]} twice, or there is none")
            rows[names[number]] = alike
    return Shard(sha256, size, rows, file)
