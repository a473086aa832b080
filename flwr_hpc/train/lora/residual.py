"""Frozen weights under adapters plus what averaging the adapters has left out (FedEx-LoRA).

An order may carry low-rank factors U V for every adapter (arXiv 2410.09432): the frozen weight is
then what was loaded plus ``s U V``, ``s = alpha / r`` as of the adapter itself. It is set, never
added to, so an order finds the same weights in a job that has just begun.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.tensorfile import TensorFile
from flwr_hpc.exchange.tensors import BadPayload, TensorInfo
from flwr_hpc.train.parallel.tensors import extent, local
from flwr_hpc.train.weights import read_weights

A, B = ".lora_A.weight", ".lora_B.weight"


class FrozenResidual:
    """Sets the frozen weights of a peft model; keeps a copy of its shards on the CPU once it does.

    Parameters
    ----------
    model : nn.Module
        Sharded, or whole on one rank.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if "default" in _factors(module)
        }
        self._loaded: dict[str, Tensor] = {}  # shards as they were, by the layer's name
        places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self._tied = {
            name for name, layer in self._layers.items() if places[id(_frozen(layer))] > 1
        }

    def set(self, path: Path | None) -> None:
        """Set this rank's shards, by the factors in a file; None: to what was loaded."""
        factors = self._read(path) if path else {}
        for name, layer in self._layers.items() if factors or self._loaded else ():
            weight = _frozen(layer)
            shard = local(weight).detach()
            loaded = self._loaded.setdefault(name, shard.to("cpu", copy=True))
            if not factors:
                shard.copy_(loaded)
                continue
            u, v = factors[name + B], factors[name + A]
            u, v = (v.T, u.T) if layer.fan_in_fan_out else (u, v)
            rows, columns = extent(weight)  # on the CPU: a GPU may multiply in fewer digits
            shard.copy_(loaded + layer.scaling["default"] * (u[rows] @ v[:, columns]))

    def _read(self, path: Path) -> dict[str, Tensor]:
        """Read all factors; of each layer they may have a rank of their own."""
        try:
            ranks = {name: info.shape[:1] for name, info in TensorFile(path).layout.items()}
        except (OSError, BadPayload) as exc:
            raise UserError(f"the residual {path} cannot be read: {exc}") from None
        layout: dict[str, TensorInfo] = {}
        for name, layer in self._layers.items():
            self._check_layer(name, layer)
            (rank,), shape = ranks.get(name + A) or (0,), _frozen(layer).shape
            outputs, inputs = reversed(shape) if layer.fan_in_fan_out else shape
            layout[name + A] = TensorInfo("F32", (rank, inputs))
            layout[name + B] = TensorInfo("F32", (outputs, rank))
        factors = {name: torch.empty(info.shape) for name, info in layout.items()}
        read_weights(path, layout, factors)
        return factors

    def _check_layer(self, name: str, layer: Any) -> None:
        """Refuse a layer whose frozen weight is no matrix of its own that can be added to."""
        weight = _frozen(layer)
        if weight.dim() != 2 or not weight.is_floating_point() or layer.use_dora.get("default"):
            raise UserError(
                f"{name}: what averaging adapters leaves out can be added to the weight of a "
                "linear layer alone, not to one in 4 bit, of an embedding, or under DoRA's "
                "magnitudes. Leave out model.lora.quantize and model.lora.dora, or take another "
                "strategy"
            )
        if name in self._tied:
            raise UserError(
                f"{name}: its weight is that of another layer, too (tie_word_embeddings), which "
                "what averaging adapters leaves out would change as well. Leave it out of "
                "model.lora.target_modules, or take another strategy"
            )


def _frozen(layer: Any) -> Any:
    """Return the weight under an adapter."""
    return layer.get_base_layer().weight


def _factors(module: nn.Module) -> Any:
    """Return the A of a layer of peft by the name of its adapter."""
    return getattr(module, "lora_A", {})
