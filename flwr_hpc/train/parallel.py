"""From a model on the CPU to one sharded over the allocation's ranks (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flwr_hpc.errors import UserError
from flwr_hpc.train.base_model import quantized
from flwr_hpc.train.model import layers

# Below this many parameters the communication calls of many units cost more than holding the
# gathered model: one unit, gathered once per step. (tiny_llama, 2 ranks on gloo: 173 ms a step
# instead of 211; 161 without any sharding.)
ONE_UNIT_BELOW = 30_000_000


def precision_policy(precision: str, device: torch.device) -> MixedPrecisionPolicy:
    """Return what to compute in; parameters and reductions stay float32.

    ``auto`` is bf16 on CUDA devices that compute in it and fp32 everywhere else.
    """
    bf16 = precision == "bf16" or (
        precision == "auto"
        and device.type == "cuda"
        # Emulated, as on a V100, it is slower than fp32.
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if not bf16:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(
    model: nn.Module,
    world_size: int,
    device: torch.device,
    precision: str = "auto",
    one_unit_below: int = ONE_UNIT_BELOW,
    replicate: int = 1,
) -> DeviceMesh:
    """Shard the model in place, move it to the device and return the mesh.

    With `replicate` above 1 (HSDP) there are so many copies of the model, each sharded over
    neighbouring ranks: what is gathered for every layer stays near, and only gradients travel far.

    A decoder layer is one unit of communication and the rest, tied embeddings included,
    another; a small model is one unit altogether. Also at world size 1, so that mixed
    precision and checkpoints are the same there.
    """
    mesh = _mesh(world_size, device, replicate)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision_policy(precision, device)}
    if whole := quantized(model):  # on every rank, where they are
        options["ignored_params"] = whole
    if sum(p.numel() for p in model.parameters()) >= one_unit_below:
        for layer in layers(model):
            fully_shard(layer, **options)
    fully_shard(model, **options)
    return mesh


def _mesh(world_size: int, device: torch.device, replicate: int) -> DeviceMesh:
    if world_size % replicate:
        valid = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"train.replicate={replicate} replicas cannot share {world_size} ranks. Valid: {valid}"
        )
    if replicate == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = replicate, world_size // replicate
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def reshard(model: nn.Module) -> None:
    """Free gathered parameters.

    After a forward pass without a backward one they stay, and would hide what is loaded into
    the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard (no copy)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Gather a copy of a tensor on the CPU in float32; a collective call."""
    whole: Any = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    own = whole.untyped_storage().data_ptr() == local(tensor).untyped_storage().data_ptr()
    return whole.to("cpu", torch.float32, copy=own)  # type: ignore[no-any-return]


def put(value: Tensor, target: Tensor) -> None:
    """Copy this rank's part of a full tensor, known to every rank, into `target`."""
    value = value.to(target.dtype)
    if isinstance(target, DTensor):
        # src_data_rank=None: every rank cuts its own shard, nothing is sent.
        value = local(
            distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        )
    with torch.no_grad():
        local(target).copy_(value)
