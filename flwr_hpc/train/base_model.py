"""What is frozen under adapters, in which precision, and whether it is the same at all sites.

In FFA-LoRA (arXiv 2403.12313) the A of every adapter stays as it was drawn and B alone is trained.
All sites have the same A, so the average of ``B_i A`` is ``mean(B_i) A``: exact, for half the
bytes. A belongs to the frozen base then. It is drawn from the seed and the name of the tensor, in
whole numbers first, so that it does not depend on torch, on the processor or on the other layers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.tensorfile import TensorFile, sha256_of
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import BASE, Order


def base_sha256(folder: Path, cache: Path) -> str:
    """Return the hash of a checkpoint's tensors, however they are dealt out among its files.

    Parameters
    ----------
    folder : Path
        Of a Hugging Face checkpoint.
    cache : Path
        Where hashes are kept; read once as long as the files stay what they are.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    identity = [[str(p), *_identity(p)] for p in (file.resolve() for file in files)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    note = cache / "bases" / f"{key[:32]}.json"
    if known := _read(note):
        return str(known["sha256"])
    try:
        found = _of_tensors(files)
    except BadPayload:  # pickles, or numbers that are not ours to read
        found = _of_files(files)
    publish(note, json.dumps({"sha256": found, "files": [str(file) for file in files]}))
    return found


def check_base(order: Order, sha256: str) -> None:
    """Refuse an order whose adapter was begun on another base than the one that is here."""
    expected = str(order.options.get(BASE) or "")
    if expected and sha256 and expected != sha256:
        raise UserError(
            f"the frozen base of {order.facility} (model.path) has other weights than the one that "
            f"the run's adapter was begun on: sha256 {sha256[:12]} here, {expected[:12]} there. "
            "Give the same checkpoint in the same precision at every facility, then start "
            f"{order.facility} again"
        )


def load_quantized(kind: Any, path: str) -> Any:
    """Load a checkpoint onto this rank's device, its layers' matrices in 4 bit (QLoRA).

    Embeddings, norms and the head stay in float32. The layers compute in the precision of what
    comes in.

    Parameters
    ----------
    kind : type
        An auto class of transformers.
    path : str
    """
    from transformers import BitsAndBytesConfig

    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as exc:
        raise UserError(
            f"model.lora.quantize=nf4 needs bitsandbytes in the job: {exc}. Fix it with: pip "
            "install 'flwr-hpc[qlora]' in the environment of the jobs"
        ) from None
    here = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = kind.from_pretrained(
        path, dtype=torch.float32, quantization_config=quantization, device_map={"": here}
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_type_is_set = False  # taken from the first input
    return model


def quantized(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights that are packed into whole numbers, which are neither trained nor cut."""
    return {p for p in model.parameters() if not p.is_floating_point()}


def size_of(parameter: Tensor) -> int:
    """Return how many numbers a parameter holds, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(math.prod(state.shape))


def freeze_a(model: nn.Module, seed: int) -> None:
    """Draw every A of a peft model, uniform within 1 / sqrt(inputs) as peft does; freeze it."""
    for name, parameter in model.named_parameters():
        if ".lora_embedding_" in name:
            raise UserError(
                "model.lora.freeze_a does not go with adapters of embeddings, whose A begins at "
                "zero. Leave them out of model.lora.target_modules"
            )
        if ".lora_A." in name:
            with torch.no_grad():
                parameter.copy_(_drawn(name, tuple(parameter.shape), seed))
            parameter.requires_grad_(False)


def frozen_factors(model: nn.Module) -> dict[str, Tensor]:
    """Return the frozen A by name in the model, none where A is trained."""
    return {n: p for n, p in model.named_parameters() if ".lora_A." in n and not p.requires_grad}


def in_precision(sha256: str, quantize: str) -> str:
    """Return the hash of a base that is packed: an adapter is of the weights it was trained on."""
    return (
        sha256
        if quantize == "none"
        else hashlib.sha256(f"{sha256} {quantize}".encode()).hexdigest()
    )


def with_factors(sha256: str, factors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the hash of a base and of what is frozen on it; the base's own if that is nothing."""
    digest, some = hashlib.sha256(sha256.encode()), False
    for name, tensor in factors:
        some = True
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest() if some else sha256


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(note: Path) -> dict[str, Any] | None:
    try:
        return read_json(note)
    except ValueError:
        return None


def _of_tensors(files: list[Path]) -> str:
    opened = [TensorFile(file) for file in files]
    where = {name: file for file in opened for name in file.layout}
    digest = hashlib.sha256()
    for name in sorted(where):
        info = where[name].layout[name]
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        digest.update(where[name].raw(name).data.cast("B") if info.nbytes else b"")
    return digest.hexdigest()


def _of_files(files: list[Path]) -> str:
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    uniform = np.random.default_rng([seed, key]).random(shape)
    return torch.from_numpy(((2.0 * uniform - 1.0) * bound).astype(np.float32))
