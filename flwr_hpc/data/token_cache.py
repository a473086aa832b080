"""A facility's tokens on disk: made once, by one process, and mapped into memory by all.

::

    SITE/cache/tokens/<key>/         ids and marks of `train` and `held`, by a rename
    SITE/cache/tokens/<stat>.json    which key files of these names, sizes and times have

The key is a hash of the files' content, the tokenizer and how sequences are made of tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flwr_hpc.data.packing import Marks, Sequences
from flwr_hpc.files import lock, publish, read_json, sync_dir

_READ_BYTES = 1 << 22


def sequences(
    root: Path, files: Sequence[Path], settings: dict[str, Any], build: Callable[[Path], None]
) -> tuple[Sequences, Sequences]:
    """Return the training and held-out sequences, made by `build` if nobody has made them.

    Who comes meanwhile waits. The kernel lets go of the lock of a process that is killed, and
    what that left half done is removed.

    Parameters
    ----------
    root : Path
    files : sequence of Path
    settings : dict
        JSON: all that the sequences depend on beside the files.
    build : callable
        Writes into the folder it is given, see `write`.
    """
    stats = [(str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    known = root / f"{_hash([stats, settings])}.json"
    if (folder := _made(root, known)) is None:
        with lock(root):
            folder = _made(root, known) or _make(root, known, files, settings, build)
    return read(folder, "train"), read(folder, "held")


def _made(root: Path, known: Path) -> Path | None:
    """Return the folder for files that have not changed, without reading them."""
    folder = root / str((read_json(known) or {}).get("key", "none"))
    return folder if folder.is_dir() else None


def _make(
    root: Path,
    known: Path,
    files: Sequence[Path],
    settings: dict[str, Any],
    build: Callable[[Path], None],
) -> Path:
    key = _hash([[_content(file) for file in files], settings])
    folder = root / key
    if not folder.is_dir():
        for left in root.glob(".*.tmp"):  # by a process that was killed: the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        draft = root / f".{key}.{uuid.uuid4().hex[:8]}.tmp"
        draft.mkdir()
        try:
            build(draft)
            sync_dir(draft)
            draft.rename(folder)
            sync_dir(root)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    publish(known, json.dumps({"key": key}))
    return folder


def write(folder: Path, name: str, made: Sequences) -> None:
    """Write sequences that are in memory."""
    made.ids.tofile(folder / f"{name}.ids")
    marks = Marks(*(getattr(made, part) for part in Marks._fields))
    write_marks(folder, name, marks, made.ids.shape[1], made.ids.dtype)


def write_marks(folder: Path, name: str, marks: Marks, seq_len: int, dtype: Any) -> None:
    """Write what belongs to the ids in ``NAME.ids``."""
    for part, values in marks._asdict().items():
        np.save(folder / f"{name}.{part}.npy", values)
    publish(folder / f"{name}.json", json.dumps([int(seq_len), np.dtype(dtype).name]))


def read(folder: Path, name: str) -> Sequences:
    """Return sequences whose ids stay on disk until they are looked at."""
    seq_len, dtype = json.loads((folder / f"{name}.json").read_text())
    marks = Marks(*(np.load(folder / f"{name}.{part}.npy") for part in Marks._fields))
    shape = (len(marks.spans), seq_len)
    if not len(marks.spans):
        return Sequences(np.empty(shape, dtype), *marks)
    return Sequences(np.memmap(folder / f"{name}.ids", dtype, "r", shape=shape), *marks)


def _content(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
