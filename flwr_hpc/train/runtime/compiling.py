"""torch.compile, a layer at a time: equal layers are compiled once."""

from __future__ import annotations

import shlex
from typing import Any

import torch
from torch import nn

from flwr_hpc.errors import UserError

# A layer's code is compiled anew for training and evaluation, for whole and last batches, and for
# layers that differ (the first of T5's). With torch's 8 what comes last would stay eager.
VARIANTS = 64


def check_compiler(device: torch.device) -> None:
    """Compile next to nothing; refuse ``train.compile`` where that fails, as all would later."""
    quote_libraries()
    try:
        torch.compile(lambda x: x.sin() + 1.0)(torch.ones(8, device=device))
    except Exception as exc:  # many kinds: of dynamo, inductor, and what these call
        raise UserError(
            f"train.compile=true, and torch.compile does not work in the job on this "
            f"{device.type}: {_reason(exc)}. It takes a C++ compiler (module load gcc, or CXX=...) "
            "and, for GPUs, Triton, which comes with torch. Load them by the facility's setup, "
            "or give train.compile=false"
        ) from None


def quote_libraries() -> None:
    """Have inductor hand g++ the folder of torch's libraries in one piece.

    It splits g++'s command as a shell does, and quotes all but this folder (torch 2.13): at a path
    with a space no code for CPUs would be linked.
    """
    folder = f"{torch.__path__[0]}/lib"
    if (quoted := shlex.quote(folder)) != folder:
        from torch.utils import cpp_extension  # of which other jobs load nothing

        cpp_extension.TORCH_LIB_PATH = quoted


def compile_layers(layers: list[nn.Module]) -> None:
    """Have each layer compiled when it first runs.

    Call after sharding: gathering parameters stays outside. Of transformers' activation
    checkpointing, which is inside of `forward`, the sharded class has its own.
    """
    import torch._dynamo  # of which other jobs load nothing

    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(VARIANTS, limits.recompile_limit)
    quote_libraries()
    for layer in layers:
        layer.forward = torch.compile(layer.forward)


def _reason(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return (lines[0] if lines else type(exc).__name__)[:300].rstrip(".")
