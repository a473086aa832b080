"""Tensor parallelism: the matrices of a layer split over neighbouring ranks (Megatron-LM's way).

Attention and MLP are blocks of two kinds of layers: the first split by columns (attention's by
heads), the last by rows. So a block needs one all-reduce of its output in the forward pass, and
one of its input's gradient in the backward pass, whatever lies between: biases, norms of each
head's queries, adapters. The ranks of a group see the same data; what is outside of the blocks
is the same on all of them, and the head's loss is taken by each of a share of the positions.

Which layers these are transformers says in its plan for the family (``base_model_tp_plan``): shapes
alone do not tell whether a matrix of queries, keys and values can be cut (GPT-NeoX's lies head by
head, GPT-2's does not), nor which norm works on a head. For T5, of which it has none, there is one
here. The blocks of a plan are checked: no parameter in them may be one that it does not name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.functional import embedding, linear
from torch.utils._pytree import tree_map_only

from flwr_hpc.config.validate import check_tensor
from flwr_hpc.errors import UserError
from flwr_hpc.train.parallel.tensors import local

# transformers' words. The last: not split, and its gradient comes in parts.
COLUMNS, ROWS, WHOLE = "colwise", "rowwise", "replicated_with_grad_allreduce"
INDEX = re.compile(r"\.\d+\.")
# transformers has no plan for T5. Its biases for relative positions have a column for each head.
_ATTENTION = {"q": COLUMNS, "k": COLUMNS, "v": COLUMNS, "o": ROWS}
_T5_BLOCKS = {
    "SelfAttention": _ATTENTION | {"relative_attention_bias": COLUMNS},
    "EncDecAttention": _ATTENTION,
    "DenseReluDense": {"wi": COLUMNS, "wi_0": COLUMNS, "wi_1": COLUMNS, "wo": ROWS},
}
_T5 = {
    f"{stack}.block.*.layer.*.{block}.{layer}": style
    for stack in ("encoder", "decoder")
    for block, styles in _T5_BLOCKS.items()
    for layer, style in styles.items()
}
OWN_PLANS = {"t5": _T5, "mt5": _T5}
# What a layer hands on to the next one's attention: each rank has that of its heads.
PER_HEAD = ("position_bias",)


def split(
    model: Any, mesh: DeviceMesh, before: Callable[[nn.Module], None] = lambda block: None
) -> set[str]:
    """Split the layers of a model in place, before it is sharded.

    Calls `before` with each block that is to be split.

    Returns
    -------
    set of str
        Names of the parameters in blocks that are not split: each rank has a part of the sum
        that is their gradient.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_tensor(inner.config.to_dict(), mesh.size())
    plan = layer_plan(inner.config)
    unsplit: set[int] = set()
    blocks = _blocks(inner.base_model, plan)
    if not blocks:
        raise UserError(
            f"train.tensor finds no layers of the plan for model_type={inner.config.model_type} in "
            f"{type(inner).__name__}. Valid: train.tensor=1"
        )
    for parent, styles in blocks:
        before(parent)
        _check(parent, styles, inner.config.model_type, mesh.size())
        unsplit |= {id(p) for p in _split_block(parent, styles, mesh)}
    return {name for name, p in model.named_parameters() if id(p) in unsplit}


def share_of_positions(
    hidden: Tensor, targets: Tensor, mesh: DeviceMesh | None
) -> tuple[Tensor, Tensor]:
    """Return the positions (dimension 1) of which this rank takes the loss.

    Head and embeddings are sharded over the tensor ranks, too, which averages their gradients: the
    loss must be scaled up by the number of these ranks. Here that is taken back for the layers.
    """
    if mesh is None:
        return hidden, targets
    degree = mesh.size()
    whole = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
    share = whole.redistribute(placements=[Shard(1)]).to_local()
    if share.requires_grad:
        share.register_hook(lambda gradient: gradient / degree)  # type: ignore[no-untyped-call]
    return share, _part(targets, mesh, 1).to_local()


def layer_plan(config: Any) -> Mapping[str, str]:
    """Return how each layer of a family is split, by name with ``*`` for its number."""
    plan: Mapping[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    plan = OWN_PLANS.get(config.model_type, plan)
    if not plan or (unknown := set(plan.values()) - {COLUMNS, ROWS, WHOLE}):
        lacks = f"{', '.join(sorted(unknown))} layers" if plan else "no plan in transformers"
        raise UserError(
            f"train.tensor splits attention and MLP of families like Llama; model_type="
            f"{config.model_type} has {lacks}. Valid: train.tensor=1"
        )
    return plan


def _blocks(model: nn.Module, plan: Mapping[str, str]) -> list[tuple[nn.Module, dict[str, str]]]:
    """Return the modules that hold what the plan names, with the style of each."""
    blocks: dict[str, dict[str, str]] = {}
    for name, _ in model.named_modules():
        if style := plan.get(INDEX.sub(".*.", name)):
            parent, _, child = name.rpartition(".")
            blocks.setdefault(parent, {})[child] = style
    return [(model.get_submodule(parent), styles) for parent, styles in blocks.items()]


def _check(block: nn.Module, styles: Mapping[str, str], family: str, degree: int) -> None:
    """Refuse a block that would compute something else if it was split."""
    kind = f"{type(block).__name__} of model_type={family}"
    known = {
        id(parameter)
        for child, style in styles.items()
        for part, _ in _parts(block.get_submodule(child), style)
        for parameter in part.parameters()
        if parameter.is_floating_point()  # else it is packed
    }
    others = [name for name, p in block.named_parameters() if id(p) not in known]
    ends = [child for child, style in styles.items() if style == ROWS]
    if others or len(ends) != 1:
        raise UserError(
            f"train.tensor cannot split {kind}: "
            + (f"how to split {others[0]} is not known" if others else f"it ends in {ends}")
            + ". Valid: train.tensor=1"
        )
    for child, style in styles.items():
        for part, dim in _parts(block.get_submodule(child), style):
            if dim is not None and part.weight.shape[dim] % degree:
                raise UserError(
                    f"train.tensor={degree} does not divide {part.weight.shape[dim]}, a size of "
                    f"{child} in {kind}. Valid: a divisor of it, e.g. train.tensor=1"
                )


def _split_block(
    block: nn.Module, styles: Mapping[str, str], mesh: DeviceMesh
) -> list[nn.Parameter]:
    """Split a block; return what of it is not split."""
    for child, style in styles.items():
        layer = block.get_submodule(child)
        for part, dim in _parts(layer, style):
            if dim is not None:
                _split_layer(part, dim, mesh)
        if style == ROWS:
            layer.register_forward_hook(partial(_leave, mesh))
    block.register_forward_pre_hook(partial(_enter, mesh), with_kwargs=True)
    if isinstance(heads := getattr(block, "n_heads", None), int):  # T5 counts; others do not
        block.n_heads = heads // mesh.size()  # type: ignore[assignment]
    return [p for p in block.parameters() if not isinstance(p, DTensor)]


def _parts(layer: nn.Module, style: str) -> Iterator[tuple[Any, int | None]]:
    """Yield the parts of a layer, which may have an adapter, and where their weights are cut.

    Of an adapter B A of a matrix that is cut by columns B is cut likewise; by rows A.
    """
    if style == WHOLE:
        yield layer, None
        return
    whole, dim = ("lora_A", 0) if style == COLUMNS else ("lora_B", 1)
    for name, part in layer.named_modules():
        if isinstance(part, nn.Linear):
            yield part, None if whole in name.split(".") else dim
        elif isinstance(part, nn.Embedding) and style == COLUMNS:
            yield part, 1


def _split_layer(layer: nn.Linear | nn.Embedding, dim: int, mesh: DeviceMesh) -> None:
    for name, parameter in list(layer.named_parameters()):
        if dim < parameter.ndim:  # all but the bias of a layer that is cut by rows
            part = _part(parameter.detach().float(), mesh, dim)
            setattr(layer, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    # Each rank adds its share of a bias that is not cut.
    multiply = partial(_multiply, portion=1.0 if dim == 0 else 1.0 / mesh.size())
    forward = multiply if isinstance(layer, nn.Linear) else _look_up
    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def _part(tensor: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """Cut a tensor that all ranks have; nothing is sent."""
    return distribute_tensor(tensor, mesh, [Shard(dim)], src_data_rank=None)


def _multiply(layer: nn.Linear, value: Tensor, portion: float) -> Tensor:
    bias = None if layer.bias is None else local(layer.bias) * portion
    return linear(value, local(layer.weight), bias)


def _look_up(layer: nn.Embedding, ids: Tensor) -> Tensor:
    return embedding(ids, local(layer.weight))


def _enter(mesh: DeviceMesh, _: nn.Module, args: Any, kwargs: Any) -> Any:
    """Sum the gradients of a block's inputs over the ranks."""

    def shared(value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        whole = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    own = {name: value for name, value in kwargs.items() if name in PER_HEAD}
    args, kwargs = tree_map_only(Tensor, shared, (args, kwargs))
    return args, kwargs | own


def _leave(mesh: DeviceMesh, _: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Sum a block's outputs over the ranks."""
    parts = DTensor.from_local(output, mesh, [Partial()], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local()
