"""From a model on the CPU to one sharded over the allocation's ranks (FSDP2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

from flwr_hpc.config.validate import check_mesh
from flwr_hpc.train.base_model import quantized
from flwr_hpc.train.model import layers
from flwr_hpc.train.parallel.tensor_parallel import split
from flwr_hpc.train.parallel.tensors import in_float32
from flwr_hpc.train.random_weights import Draw
from flwr_hpc.train.runtime.compiling import compile_layers
from flwr_hpc.train.runtime.device import computes_in_bf16

# Below this many parameters the communication calls of many units cost more than holding the
# gathered model: one unit, gathered once per step. (tiny_llama, 2 ranks on gloo: 173 ms a step
# instead of 211; 161 without any sharding.)
ONE_UNIT_BELOW = 30_000_000


@dataclass(frozen=True)
class Meshes:
    """The ranks as replicas x shards x tensor ranks; those of one layer's parts are neighbours."""

    layers: DeviceMesh  # Over which the layers are sharded: replicas (if any) x shards
    # Over which all else is: also over the tensor ranks, as nothing of it is split.
    rest: DeviceMesh
    tensor: DeviceMesh | None  # Over which the layers are split


def meshes(world_size: int, device: torch.device, replicate: int = 1, tensor: int = 1) -> Meshes:
    """Arrange the ranks.

    With `replicate` above 1 (HSDP) there are so many copies of the model, each sharded over
    neighbouring ranks: what is gathered for every layer stays near, and only gradients travel far.
    """
    check_mesh(world_size, replicate, tensor)
    sizes = {"replicate": replicate, "shard": world_size // replicate // tensor}
    data = ("replicate", "shard") if replicate > 1 else ("shard",)
    if tensor == 1:
        mesh = _mesh(device, sizes, data)
        return Meshes(mesh, mesh, None)
    whole = _mesh(device, sizes | {"tensor": tensor}, (*data, "tensor"))
    rest = _mesh(device, sizes | {"shard": sizes["shard"] * tensor}, data)
    return Meshes(whole[data], rest, whole["tensor"])


def _mesh(device: torch.device, sizes: dict[str, int], names: tuple[str, ...]) -> DeviceMesh:
    shape = tuple(sizes[name] for name in names)
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def precision_policy(precision: str, device: torch.device) -> MixedPrecisionPolicy:
    """Return what to compute in; parameters and reductions stay float32.

    ``auto`` is bf16 on GPUs that compute in it and fp32 everywhere else.
    """
    if precision != "bf16" and not (precision == "auto" and computes_in_bf16(device)):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(
    model: nn.Module,
    over: Meshes,
    device: torch.device,
    precision: str = "auto",
    one_unit_below: int = ONE_UNIT_BELOW,
    compiled: bool = False,
    draw: Draw = lambda part: None,
    cpu_offload: bool = False,
) -> set[str]:
    """Split and shard the model in place, and move it to the device.

    A decoder layer is one unit of communication and the rest, tied embeddings included,
    another; a small model that is not split is one unit altogether. Also at world size 1, for
    mixed precision and offloading; but one rank that computes in float32 has nothing to gather or
    to cast. With `compiled` the layers are compiled as they first run. `draw` gives each
    unit the weights that it has not got, before it is cut.
    With `cpu_offload` the shards, their gradients and so the optimizer's state stay on the CPU.

    Returns
    -------
    set of str
        Names of the parameters whose gradients have yet to be summed over the tensor ranks.
    """
    policy = precision_policy(precision, device)
    options: dict[str, Any] = {"mp_policy": policy}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    if whole := quantized(model):  # on every rank, where they are
        options["ignored_params"] = whole
    large = sum(p.numel() for p in model.parameters()) >= one_unit_below
    # A unit at a time in float32 as a whole: of what is mapped from a file each rank reads all, and
    # keeps its shards.
    units = layers(model)
    unsummed: set[str] = set()
    if over.tensor:
        unit_of = {module: unit for unit in units for module in unit.modules()}
        unsummed = split(model, over.tensor, lambda block: draw(unit_of.get(block, model)))
    if policy.param_dtype is None and not cpu_offload and over.rest.size() == 1:
        for part in (*units, model):
            draw(part)
        in_float32(model).to(device)
    else:
        if large or over.tensor:
            for layer in units:
                draw(layer)
                fully_shard(in_float32(layer), mesh=over.layers, **options)
        draw(model)
        fully_shard(in_float32(model), mesh=over.rest, **options)
    if compiled:
        compile_layers(units)
    return unsummed


def reshard(model: nn.Module) -> None:
    """Free gathered parameters.

    After a forward pass without a backward one they stay, and would hide what is loaded into
    the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
