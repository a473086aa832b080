"""A rank's part of a sharded tensor, and the way from and to a whole one."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard (no copy)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def extent(tensor: Tensor) -> tuple[slice, ...]:
    """Return where this rank's part lies in the whole tensor, a range of each dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    (part,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return tuple(slice(a, a + n) for a, n in zip(part.offsets, part.sizes, strict=True))


def cut_in_rows(tensor: Tensor) -> Tensor:
    """Return a tensor that is cut along its first dimension alone.

    A collective call; nothing is sent but where another dimension was cut (tensor parallelism),
    and there no rank gets more than it had.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor) or not any(map(_dim, tensor.placements)):
        return tensor
    return tensor.redistribute(placements=[Shard(0) if _dim(p) else p for p in tensor.placements])


def _dim(placement: Placement) -> int:
    return getattr(placement, "dim", 0)


def holders(tensor: Tensor, ranks: int) -> int:
    """Return how many of all ranks hold the same part of a tensor as this one."""
    if not isinstance(tensor, DTensor):
        return ranks
    mesh, placements = tensor.device_mesh, tensor.placements
    return ranks // prod(mesh.size(i) for i, p in enumerate(placements) if not p.is_replicate())


def full(tensor: Tensor) -> Tensor:
    """Gather a copy of a tensor on the CPU in float32; a collective call."""
    whole: Any = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    own = whole.untyped_storage().data_ptr() == local(tensor).untyped_storage().data_ptr()
    return whole.to("cpu", torch.float32, copy=own)  # type: ignore[no-any-return]


def in_float32(module: nn.Module) -> nn.Module:
    """Return a module with the parameters that are not sharded yet in float32."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()  # the same parameter: it may be tied
    return module
