"""Base models to adapt, small enough for a test."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flwr_hpc.data.batches import load_tokenizer


def save_base(folder: Path) -> Path:
    """Write a checkpoint of random weights for the byte tokenizer; return `folder`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", **sizes, **heads, vocab_size=len(load_tokenizer("byte")))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
