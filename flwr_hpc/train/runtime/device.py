"""The device of a rank: which it is, how ranks talk between theirs, and what is set on it."""

from __future__ import annotations

from typing import Any

import torch

from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.worker.ranks import Ranks

# The backend of torch.distributed for each kind of device; ROCm's GPUs call themselves cuda, too.
BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


def choose_device(ranks: Ranks) -> torch.device:
    """Return this rank's GPU, made the current one, or the CPU where torch sees none."""
    for kind in BACKENDS:
        devices = torch.get_device_module(kind)
        if devices.is_available():
            device = torch.device(kind, ranks.local_rank % devices.device_count())
            devices.set_device(device)
            return device
    return torch.device("cpu")


def backends(device: torch.device) -> str:
    """Return how tensors travel between the ranks: those of the host by gloo."""
    own = BACKENDS.get(device.type)
    return f"cpu:gloo,{device.type}:{own}" if own else "gloo"


def peak_bytes(device: torch.device) -> int | None:
    """Return the most that tensors took of a device's memory so far; None for the host's."""
    if device.type == "cpu":
        return None
    return int(torch.get_device_module(device).max_memory_allocated(device))


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 by itself: emulated, as on a V100, it is slower."""
    if device.type == "cpu":
        return False
    devices: Any = torch.get_device_module(device)
    return bool(devices.is_bf16_supported(including_emulation=False))


def set_product_precision(train: TrainConfig, device: torch.device) -> None:
    """Let a GPU take products of float32 in TF32, if ``train.tf32``; a CPU keeps to float32."""
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
