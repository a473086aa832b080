"""Whether all sites put their adapters on the same frozen base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.tensorfile import TensorFile, sha256_of
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import BASE, Order


def base_sha256(folder: Path, cache: Path) -> str:
    """Return the hash of a checkpoint's tensors, however they are dealt out among its files.

    Parameters
    ----------
    folder : Path
        Of a Hugging Face checkpoint.
    cache : Path
        Where hashes are kept; read once as long as the files stay what they are.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    identity = [[str(p), *_identity(p)] for p in (file.resolve() for file in files)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    note = cache / "bases" / f"{key[:32]}.json"
    if known := _read(note):
        return str(known["sha256"])
    try:
        found = _of_tensors(files)
    except BadPayload:  # pickles, or numbers that are not ours to read
        found = _of_files(files)
    publish(note, json.dumps({"sha256": found, "files": [str(file) for file in files]}))
    return found


def check_base(order: Order, sha256: str) -> None:
    """Refuse an order whose adapter was begun on another base than the one that is here."""
    expected = str(order.options.get(BASE) or "")
    if expected and sha256 and expected != sha256:
        raise UserError(
            f"the frozen base of {order.facility} (model.path) has other weights than the one that "
            f"the run's adapter was begun on: sha256 {sha256[:12]} here, {expected[:12]} there. "
            "Give the same checkpoint in the same precision at every facility, then start "
            f"{order.facility} again"
        )


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(note: Path) -> dict[str, Any] | None:
    try:
        return read_json(note)
    except ValueError:
        return None


def _of_tensors(files: list[Path]) -> str:
    opened = [TensorFile(file) for file in files]
    where = {name: file for file in opened for name in file.layout}
    digest = hashlib.sha256()
    for name in sorted(where):
        info = where[name].layout[name]
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        digest.update(where[name].raw(name).data.cast("B") if info.nbytes else b"")
    return digest.hexdigest()


def _of_files(files: list[Path]) -> str:
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
