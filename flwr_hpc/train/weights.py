"""Where tensors of torch meet files of weights, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.tensorfile import TensorFile, write_safetensors
from flwr_hpc.exchange.tensors import (
    FLOATS,
    BadPayload,
    Layout,
    TensorInfo,
    Tensors,
    check_layout,
    check_values,
    widen,
)
from flwr_hpc.train.parallel.tensors import extent, local

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


def read_weights(path: Path, layout: Layout, targets: Mapping[str, Tensor]) -> None:
    """Fill this rank's parts of tensors from a file; bfloat16 becomes what they are.

    Of the file it reads nothing but its header and these parts, and so knows no more of the
    values: ranks have to refuse it together (`Group.refuse_together`).

    Parameters
    ----------
    path : Path
    layout : Layout
        Of all that the file has to hold.
    targets : mapping of str to Tensor
        Some or all of it.
    """
    try:
        file = TensorFile(path)
    except (OSError, BadPayload) as exc:
        raise UserError(f"weights {path} cannot be read: {exc}") from None
    try:
        check_layout(file.layout, layout, FLOATS)
        for name, target in targets.items():
            bits, dtype = _part(file, name, extent(target)), file.layout[name].dtype
            check_values(name, bits, file.layout[name], layout[name])
            with torch.no_grad():
                local(target).copy_(torch.from_numpy(widen(bits, dtype)))
    except BadPayload as exc:
        raise UserError(
            f"weights {path.name} do not fit the model: {exc}. "
            "All facilities must use the same model configuration and tokenizer."
        ) from None


def _part(tensors: Tensors, name: str, where: tuple[slice, ...]) -> NDArray[Any]:
    """Return a part of a tensor, as stored."""
    if not where:
        return tensors.raw(name)
    first, *others = where
    return tensors.rows(name, first.start, first.stop)[slice(None), *others]
