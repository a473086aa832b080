"""The server's state on disk: sets of tensors and a small record of everything else.

Any moment may be the last: what `restore` finds is the state of the last `commit`, whole.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from flwr_hpc.exchange.records import lazy_record
from flwr_hpc.exchange.tensorfile import (
    Numbers,
    TensorFile,
    aligned,
    write_safetensors,
    write_stream,
)
from flwr_hpc.exchange.tensors import TensorInfo
from flwr_hpc.files import publish, read_json


class FileCheckpoints:
    """Checkpoints in one folder.

    ::

        FOLDER/state.json                    {"state": ..., "files": {name: file name}}
              /<name>-<random>.safetensors   never overwritten: a name that is put again
                                             gets another file until the next commit

    Parameters
    ----------
    folder : Path
        Used by nothing else.
    memory : int
        Bytes of arrays that are in memory already and may wait there to be written.
    """

    def __init__(self, folder: Path, memory: int = 64 << 20) -> None:
        self._folder, self._memory = folder, memory
        self._files = self._committed()[1]

    def put(self, name: str, tensors: Iterable[tuple[str, Numbers]]) -> ArrayRecord:
        """Write a set of tensors, a block at a time, and return it as a lazy record.

        It survives this process only if the next `commit` names it.

        Raises
        ------
        ValueError
            If the name is not fit for a file name, or a tensor comes twice.
        """
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(f"'{name}' may hold letters, digits, '.', '_' and '-' only")
        path = self._folder / f"{name}-{uuid.uuid4().hex[:8]}.safetensors"
        sha256 = _write(path, iter(tensors), self._memory)
        self._files[name] = path.name
        return lazy_record(TensorFile(path, sha256))

    def get(self, name: str) -> ArrayRecord:
        """Return what was put last, or restored, under a name; KeyError if nothing was."""
        return lazy_record(TensorFile(self._folder / self._files[name]))

    def commit(self, state: dict[str, Any]) -> None:
        """Make `state` and the tensor sets in ``state["tensors"]`` what `restore` finds.

        Sets that it does not name are deleted; records that were read from them stay good.

        Raises
        ------
        KeyError
            If it names a set that does not exist.
        """
        files = {name: self._files[name] for name in state.get("tensors", [])}
        body = json.dumps({"state": state, "files": files}, allow_nan=False)
        publish(self._folder / "state.json", body)
        self._files = files
        self._clean()

    def restore(self) -> dict[str, Any] | None:
        """Return the state of the last commit, or None if there was none."""
        state, self._files = self._committed()
        return state

    def _committed(self) -> tuple[dict[str, Any] | None, dict[str, str]]:
        saved = read_json(self._folder / "state.json")
        return (saved["state"], dict(saved["files"])) if saved else (None, {})

    def _clean(self) -> None:
        """Delete what no state needs, remains of killed processes included."""
        keep = {"state.json", *self._files.values()}
        for path in self._folder.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)


def _write(path: Path, tensors: Iterator[tuple[str, Numbers]], memory: int) -> str:
    """Write tensors; return the file's sha256.

    Those that are computed as they are read take no memory until then: with all names and shapes
    known beforehand the file is written once.
    """
    known: dict[str, Numbers] = {}
    held = 0
    for name, tensor in tensors:
        if name in known:
            raise ValueError(f"{path}: tensor '{name}' comes twice")
        held += tensor.nbytes if isinstance(tensor, np.ndarray) else 0
        if held > memory:
            return write_stream(path, chain(_emptied(known), [(name, tensor)], tensors))
        # A copy: whoever yields it may use the same array for the next one.
        known[name] = tensor.copy() if isinstance(tensor, np.ndarray) else tensor
    layout = aligned({name: TensorInfo.of(tensor) for name, tensor in known.items()})
    return write_safetensors(path, ((name, known[name]) for name in layout), layout)


def _emptied(known: dict[str, Numbers]) -> Iterator[tuple[str, Numbers]]:
    for name in list(known):
        yield name, known.pop(name)
