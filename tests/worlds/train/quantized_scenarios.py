"""What the ranks of `test_quantized` do; importable, so that it can be sent to processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from worlds.train.torch_ranks import tiny_model, tiny_trainer, weights_of

from flwr_hpc.train.base_model import quantized, size_of
from flwr_hpc.train.rendezvous import Group


def trained(group: Group, folder: Path, path: Path, quantize: str, **options: Any) -> Any:
    """Train an adapter; return losses, gradient norm, its weights and what is packed below it."""
    trainer = tiny_trainer(group, lora=True, path=str(path), quantize=quantize, **options)
    model: Any = trainer._model
    before = [p.detach().clone() for p in quantized(model)]
    losses: list[float] = []
    done = trainer.train(4, report=lambda _, loss: losses.append(loss()))
    return {
        "losses": losses,
        "grad_norm": done.last_grad_norm,
        "weights": weights_of(trainer, folder / "weights.safetensors", group),
        "packed": sum(size_of(p) for p in quantized(model)),
        "bytes": sum(p.nbytes for p in quantized(model)),
        "kept": all(p.equal(old) for p, old in zip(quantized(model), before, strict=True)),
    }


def unpacked(group: Group, path: Path, out: Path) -> float:
    """Write a checkpoint of the weights that the packed ones stand for; return FLOPs per token."""
    from bitsandbytes.functional import dequantize_4bit

    built = tiny_model(lora=True, path=str(path), quantize="nf4")
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = dict(plain.named_parameters())
    for name, p in built.model.named_parameters():
        if not p.is_floating_point():
            ours = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            with torch.no_grad():
                weights[ours].copy_(dequantize_4bit(p.data, p.quant_state))
    plain.save_pretrained(out)
    return built.flops_per_token
