"""Random weights of a large model, drawn a layer at a time when it is sharded.

The model is made on torch's ``meta`` device, where tensors have shapes and no memory. A layer gets
its memory and its values just before it is sharded, and what lies outside of the layers comes last:
no process holds more than its shards and one of these parts. Each part is drawn on the CPU by the
seed and its name, so the weights do not depend on the number of ranks or on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flwr_hpc.errors import UserError

LARGE = 30_000_000  # Parameters; a smaller model is sharded as one part, see `parallel.sharding`
UNSET = 255  # Each byte of what is not drawn: a float that is none, a truth that is neither

Draw = Callable[[nn.Module], None]  # Gives a layer, or the whole model, the values it has not got


def make(kind: Any, config: Any) -> Any:
    """Return a model without weights, or a small one with random weights, in float32.

    Parameters
    ----------
    kind : type
        An auto class of transformers.
    config : PreTrainedConfig
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = kind.from_config(config, dtype=torch.float32)
    if sum(p.numel() for p in model.parameters()) >= LARGE:
        return model
    return kind.from_config(config, dtype=torch.float32)


class RandomWeights:
    """Draws a model's weights, part by part, as transformers would.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device.
    layers : list of Module
        Its parts; all else is one more.
    seed : int
    """

    def __init__(self, model: PreTrainedModel, layers: list[nn.Module], seed: int) -> None:
        self._model: Any = model
        self._layers, self._seed = layers, seed
        self._names = {module: name for name, module in model.named_modules()}

    def draw(self, part: nn.Module) -> None:
        """Give a layer, or the whole model, the values it has not got yet."""
        whole = part is self._model
        if whole:
            for layer in self._layers:
                self.draw(layer)
        made = _with_memory(part)
        if not made:
            return
        name = self._names[part]
        key = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        torch.manual_seed(int.from_bytes(key[:8]) >> 1)
        if whole:
            self._model.initialize_weights()  # of modules that no layer has
        else:
            with torch.no_grad():
                part.apply(self._owner(name)._initialize_weights)
        for tensor_name, tensor in made.items():
            if tensor.numel() and (_bytes(tensor)[: tensor.itemsize] == UNSET).all():
                raise UserError(
                    f"model_type={self._model.config.model_type} cannot begin with random weights: "
                    f"transformers does not say how to draw '{tensor_name}' of a large model. "
                    "Give a checkpoint: model.path=PATH"
                )

    def _owner(self, name: str) -> Any:
        """Return the innermost model of transformers that a layer is in: it knows how to draw."""
        owner = module = self._model
        for child in name.split("."):
            module = getattr(module, child)
            owner = module if isinstance(module, PreTrainedModel) else owner
        return owner


def _with_memory(part: nn.Module) -> dict[str, Tensor]:
    """Give tensors their memory, tied ones the same; return them by name."""
    found: dict[str, Tensor] = {}
    made: dict[Tensor, Tensor] = {}
    for prefix, module in part.named_modules():
        tensors: dict[str, Any]
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    if tensor not in made:
                        made[tensor] = found[f"{prefix}.{name}"] = _new(tensor)
                    tensors[name] = made[tensor]
    return found


def _new(tensor: Tensor) -> Tensor:
    made = torch.empty_like(tensor, device="cpu")
    _bytes(made).fill_(UNSET)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().view(torch.uint8)
