"""What is measured while training: throughput, utilisation, memory."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from torch import nn


def flops_per_token(config: Any, model: nn.Module, seq_len: int) -> float:
    """Return the floating-point operations of one training step per token.

    ``6 N + 6 L heads (d_qk + d_v) seq_len`` (PaLM, arXiv 2204.02311, appendix B), N the
    parameters that are multiplied with: an input embedding counts only when tied to the head.
    Frozen parameters (LoRA) cost 4 and not 6, as they get no gradient.
    Returns 0 if the configuration does not name the shape of its attention.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is not None and not getattr(config, "tie_word_embeddings", False):
        if embedding.weight.requires_grad:
            trained -= embedding.weight.numel()
        else:
            frozen -= embedding.weight.numel()
    try:
        heads, depth = config.num_attention_heads, config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except AttributeError:
        return 0.0
    attention = 12.0 * float(depth * heads * head_dim) * seq_len
    return 6.0 * trained + 4.0 * frozen + attention


def mfu(tokens_per_s: float, flops: float, devices: int, peak_tflops: float | None) -> float | None:
    """Return the model FLOP/s utilisation in percent, or None if it cannot be told.

    Parameters
    ----------
    tokens_per_s : float
        Over all devices.
    flops : float
        Per token.
    peak_tflops : float or None
        Of one device.
    """
    if not peak_tflops or not flops:
        return None
    return 100.0 * flops * tokens_per_s / (devices * peak_tflops * 1e12)


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory this rank held so far, in GB: the device's, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
