"""The site's half of the exchange, used by the thin ClientApp: no torch, little memory."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from flwr_hpc.exchange.codec import FullWeights, sha256_of
from flwr_hpc.exchange.records import RecordTensors, inline
from flwr_hpc.exchange.store import PREFIX, Reference, Store
from flwr_hpc.exchange.tensors import BadPayload, TensorFile
from flwr_hpc.protocol import STATUS


def receive(content: RecordDict, key: str, store: Store, target: Path) -> Path | None:
    """Write the arrays of a message to a verified safetensors file.

    Parameters
    ----------
    content : RecordDict
        Of the message.
    key : str
        Of the arrays in it.
    store : Store
    target : Path
        The file; or an existing folder, in which the file is named ``<sha256>.safetensors``.

    Returns
    -------
    Path or None
        The file; None if the message carries no such arrays.

    Raises
    ------
    BadPayload
        If the payload is missing, or not what the message says.
    OSError
        If it cannot be read or written.
    """
    if (found := content.get(PREFIX + key)) is not None:
        ref = Reference.from_record(found)
        path = target / f"{ref.sha256}.safetensors" if target.is_dir() else target
        if _holds(path, ref):
            path.touch()  # in use again: not to be pruned
        else:
            store.get(ref, path)
        return path
    record = content.get(key)
    if not isinstance(record, ArrayRecord) or not record:
        return None
    if not target.is_dir():
        FullWeights().encode(RecordTensors(record), target)
        return target
    unnamed = target / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        sha256 = FullWeights().encode(RecordTensors(record), unnamed)
        return unnamed.replace(target / f"{sha256}.safetensors")
    finally:
        unnamed.unlink(missing_ok=True)


def send(
    content: RecordDict,
    key: str,
    weights: Path,
    sha256: str,
    store: Store,
    inline_below_mb: float = 1.0,
    owner: str = "",
) -> None:
    """Add a file of weights to a message, as a reference or, if small, inline.

    Parameters
    ----------
    content : RecordDict
        Of the message; changed.
    key : str
        For the arrays in it.
    weights : Path
        A published safetensors file, which must not be written to again.
    sha256 : str
        Of that file.
    store : Store
    inline_below_mb : float
    owner : str
        Folder in the store; default: the facility that the content's status names. Folders
        keep sites apart, since the server deletes what it has received.

    Raises
    ------
    BadPayload
        If a file to be sent inline is malformed, or not what `sha256` says.
    OSError
        If the store cannot be written to.
    """
    if weights.stat().st_size >= inline_below_mb * 1e6:
        ref = store.put(weights, f"from-{owner or _facility(content)}", sha256)
        content[PREFIX + key] = ref.to_record()
        return
    if (found := sha256_of(weights)) != sha256:
        raise BadPayload(f"{weights.name} has the sha256 {found}, expected {sha256}")
    content[key] = inline(TensorFile(weights, sha256))


def _holds(path: Path, ref: Reference) -> bool:
    """Whether the payload is here already, as when an order is sent again."""
    return path.is_file() and path.stat().st_size == ref.bytes and sha256_of(path) == ref.sha256


def _facility(content: RecordDict) -> str:
    status = content.get(STATUS)
    told = json.loads(str(status["json"])) if isinstance(status, ConfigRecord) else {}
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(told.get("facility") or "site"))
