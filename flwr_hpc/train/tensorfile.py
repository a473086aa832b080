"""safetensors files written and read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flwr_hpc.errors import UserError
from flwr_hpc.files import draft


def write_tensors(path: Path, shapes: dict[str, list[int]], tensors: Iterable[Tensor]) -> str:
    """Publish float32 tensors as a safetensors file; return its sha256.

    The library's own writer wants all tensors at once; here only one has to be in memory.

    Parameters
    ----------
    path : Path
    shapes : dict of str to list of int
    tensors : iterable of Tensor, float32
        In the order of `shapes`.
    """
    digest = hashlib.sha256()
    with draft(path) as temporary, open(temporary, "wb") as file:
        for part in _parts(shapes, tensors):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    array: Any = tensor.contiguous().numpy()
    return memoryview(array).cast("B") if tensor.numel() else b""


def _parts(shapes: dict[str, list[int]], tensors: Iterable[Tensor]) -> Iterator[Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for shape, tensor in zip(shapes.values(), tensors, strict=True):
        assert list(tensor.shape) == shape
        assert tensor.dtype == torch.float32
        yield _bytes(tensor)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for lazy reading."""
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as exc:
        raise UserError(f"weights {path} cannot be read: {exc}") from None
    with file as opened:
        yield opened


def read_tensors(path: Path, shapes: dict[str, list[int]]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a file, one at a time."""
    with open_tensors(path) as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        check_names(found, shapes, path)
        for name in shapes:
            value = file.get_tensor(name)
            # Checked on the whole tensor, so that all ranks refuse together.
            if not torch.isfinite(value).all():
                raise UserError(f"weights {path.name}: {name} holds NaN or infinity")
            yield name, value


def check_names(found: dict[str, list[int]], expected: dict[str, list[int]], path: Path) -> None:
    """Refuse weights that do not fit the model."""
    problems = [
        (expected.keys() - found.keys(), "missing"),
        (found.keys() - expected.keys(), "not in the model"),
    ]
    for names, what in problems:
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(
                f"weights {path.name} do not fit the model: {len(names)} tensors {what} ({shown}). "
                "All facilities must use the same model configuration."
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"weights {path.name} do not fit the model: {name} has shape {found[name]}, "
                f"expected {shape}. All facilities must use the same model and tokenizer."
            )
