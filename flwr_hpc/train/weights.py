"""Where tensors of torch meet files of weights, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.tensorfile import TensorFile, write_safetensors
from flwr_hpc.exchange.tensors import (
    FLOATS,
    BadPayload,
    Layout,
    TensorInfo,
    check_layout,
    check_values,
)

HOST_SHARE = 0.25  # Of the host's memory that weights may take while they wait to be written


def layout_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, TensorInfo]:
    """Describe tensors as they travel: in float32."""
    return {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in tensors}


def write_weights(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> str:
    """Publish float32 tensors, in the order of `layout`; return the file's sha256."""
    arrays = (tensor.contiguous().numpy() for tensor in tensors)
    return write_safetensors(path, zip(layout, arrays, strict=True), layout)


def gathered_weights(
    path: Path, layout: Layout, tensors: Iterator[Tensor], share: float = HOST_SHARE
) -> Callable[[], str]:
    """Take tensors as they come and return what publishes them; too large ones at once.

    Parameters
    ----------
    path : Path
    layout : Layout
        Of the tensors, in their order.
    tensors : iterator of Tensor
        Float32, on the host; nobody else changes them.
    share : float
        Of the host's memory.
    """
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sum(info.nbytes for info in layout.values()) > share * host:
        sha256 = write_weights(path, layout, tensors)
        return lambda: sha256
    waiting = list(tensors)
    return lambda: write_weights(path, layout, waiting)


def read_weights(path: Path, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a file, in the order of `layout`; bfloat16 as float32.

    All ranks read it whole, and so refuse it together.
    """
    try:
        file = TensorFile(path)
    except (OSError, BadPayload) as exc:
        raise UserError(f"weights {path} cannot be read: {exc}") from None
    try:
        check_layout(file.layout, layout, FLOATS)
        for name in layout:
            check_values(name, file.raw(name), file.layout[name], layout[name])
            yield name, torch.from_numpy(file.tensor(name))
    except BadPayload as exc:
        raise UserError(
            f"weights {path.name} do not fit the model: {exc}. "
            "All facilities must use the same model configuration and tokenizer."
        ) from None
