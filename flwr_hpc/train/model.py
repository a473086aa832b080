"""A language model of transformers, ready to be sharded, and its small files."""

from __future__ import annotations

import tempfile
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)
from transformers.utils import cached_file

from flwr_hpc.config.schema import LoraConfig, ModelConfig
from flwr_hpc.errors import UserError, closest
from flwr_hpc.train.base_model import freeze_a, frozen_factors, load_quantized
from flwr_hpc.train.lora.rank import AdapterRank
from flwr_hpc.train.metrics import flops_per_token
from flwr_hpc.train.random_weights import Draw, RandomWeights, make

_aten = torch.ops.aten
# Costly to compute again and small beside what activation functions and norms keep: the results
# of matrix products, and of attention.
KEPT = [
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A model on the CPU, in float32 as soon as it is sharded."""

    model: nn.Module
    # Name in the exchanged file, for each name in the model's state dict that travels:
    # Hugging Face names, tied duplicates left out; for LoRA those of the adapter file.
    names: dict[str, str]
    # The same for an adapter's frozen A, of which only the initial weights have a copy.
    frozen: dict[str, str]
    files: dict[str, str]  # Text files that make the weights a Hugging Face directory
    rank: AdapterRank
    flops_per_token: float  # Of one training step; 0 where the model's shape is not known
    draw: Draw  # To be called with each part before it is sharded: its weights may not be there yet


def build(
    config: ModelConfig,
    tokenizer: Any,
    seed: int,
    seq_len: int,
    checkpointing: str = "none",
    lora_r: int | None = None,
    draw_later: bool = False,
) -> Built:
    """Build the model; the same weights on every rank and at every facility.

    `lora_r` is the rank of the facility's adapters, if it is smaller than the run's. With
    `draw_later` the random weights of a large model are left to `Built.draw`.

    peft and activation checkpointing go in here, before sharding: adapters added to a sharded
    model would stay apart on every rank.
    """
    torch.manual_seed(seed)
    base = _from_checkpoint(config) if config.path else _from_config(config, tokenizer)
    base.config.use_cache = False  # the cache is for generation
    _check_size(base, tokenizer, seq_len)
    draw: Draw = lambda part: None  # noqa: E731
    if base.device.type == "meta":
        draw = RandomWeights(base, layers(base), seed).draw
        if not draw_later:
            draw(base)
    if checkpointing != "none":
        base.gradient_checkpointing_enable(_recomputation(checkpointing))
    files = _tokenizer_files(tokenizer)
    rank = AdapterRank(config.lora.r if lora_r is None else lora_r, config.lora.r)
    if config.lora.r == 0:
        model: Any = base
        files |= _model_files(base)
    else:
        torch.manual_seed(seed + 1)  # the adapter's draw does not depend on how the base came
        model = _with_lora(base, config, rank.own)
        if config.lora.freeze_a:
            freeze_a(model, seed)
        files |= _adapter_files(model, config.lora)
    names = {name: _file_name(name) for name in exchanged(model)}
    frozen = {name: _file_name(name) for name in frozen_factors(model)}
    flops = flops_per_token(base.config, model, seq_len)
    return Built(model, names, frozen, files, rank, flops, draw)


def _recomputation(kind: str) -> dict[str, Any]:
    """Return how torch's `checkpoint` is to treat a layer."""
    if kind == "full":
        return {"use_reentrant": False}
    kept = partial(create_selective_checkpoint_contexts, KEPT)
    return {"use_reentrant": False, "context_fn": kept}


def exchanged(model: nn.Module) -> dict[str, Tensor]:
    """Return what travels, by name in the state dict.

    Parameters and persistent buffers of floating point, each tied one once; of a model with
    frozen parameters only the others.
    """
    adapter = any(not p.requires_grad for p in model.parameters())
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted = tensor.requires_grad if adapter else tensor.is_floating_point()
        if wanted and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def is_encoder_decoder(model: Any) -> bool:
    """Whether an encoder reads and a decoder writes."""
    return bool(model.config.is_encoder_decoder)


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of decoder and encoder, whatever they are called.

    The modules transformers says must not be split; where it says nothing, the largest list of
    modules that lies in no other (an expert's lies in a layer's).
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    if known := [m for m in model.modules() if type(m).__name__ in kinds]:
        return known
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{o}.") for o in lists)]
    return list(max(outer, key=_parameters, default=[]))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _from_checkpoint(config: ModelConfig) -> Any:
    path = str(config.path)
    try:
        kind = _kind(AutoConfig.from_pretrained(path))
        if config.lora.quantize != "none":
            return load_quantized(kind, path)
        return _mapped(kind, path, config.lora.dora)
    except (OSError, ValueError) as exc:
        raise UserError(
            f"model.path={path} cannot be loaded: {_first_line(exc)}. Give a local directory "
            "that holds a language model, or a hub name in the local Hugging Face cache."
        ) from None


def _mapped(kind: Any, path: str, dora: bool) -> Any:
    """Load a checkpoint in its own precision: its weights stay in the file, mapped, till sharded.

    So no rank holds the whole of a safetensors checkpoint that is sharded layer by layer. Not where
    float32 gives other numbers: of buffers that are computed in the model's precision, and of
    DoRA's magnitudes; nor of what transformers converts as it loads, as Mixtral's experts.
    """
    if not dora:
        model = kind.from_pretrained(path, dtype="auto")
        if all(b.dtype == torch.float32 for b in model.buffers() if b.is_floating_point()):
            return model
    return kind.from_pretrained(path, dtype=torch.float32)


def checkpoint_folder(path: str) -> Path:
    """Return where the files of a checkpoint lie, that of a hub name in the local cache."""
    if (folder := Path(path)).is_dir():
        return folder
    return Path(str(cached_file(path, "config.json"))).parent


def _from_config(config: ModelConfig, tokenizer: Any) -> Any:
    values = dict(config.config)
    kind = values.pop("model_type", None)
    if not kind:
        raise UserError("model: give model.path or model.config with a model_type")
    values.setdefault("vocab_size", len(tokenizer))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(key, getattr(tokenizer, key, None))
    try:
        known = AutoConfig.for_model(kind)
        _refuse_unknown(values, known)
        if known.is_encoder_decoder:
            values.setdefault("decoder_start_token_id", values["pad_token_id"])
        return make(_kind(known), AutoConfig.for_model(kind, **values))
    except UserError:
        raise
    except Exception as exc:  # transformers checks by many types of its own
        raise UserError(f"model.config is not valid: {_first_line(exc)}") from None


def _kind(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _refuse_unknown(values: dict[str, Any], known: PreTrainedConfig) -> None:
    """Transformers takes any key; a misspelt one would silently leave the default."""
    valid = set(known.to_dict()) | set(known.attribute_map)
    valid |= {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "rope_theta"}
    valid |= {"rope_scaling", "attn_implementation"}
    for key in values:
        if key not in valid:
            raise UserError(
                f"model.config.{key} is not a key of {known.model_type}.{closest(key, valid)} "
                f"Valid: {', '.join(sorted(valid))}."
            )


def _check_size(base: Any, tokenizer: Any, seq_len: int) -> None:
    rows = base.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(
            f"the model has {rows} embeddings but the tokenizer {len(tokenizer)} tokens. "
            "Use the model's own tokenizer: data.tokenizer=PATH"
        )
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest and seq_len > longest:
        raise UserError(f"data.seq_len={seq_len} is longer than the model allows ({longest})")


def _with_lora(base: Any, config: ModelConfig, rank: int) -> Any:
    import peft

    try:
        return peft.get_peft_model(base, _lora(config.lora, rank, base, config.path))
    except ValueError as exc:
        raise UserError(f"model.lora is not valid: {_first_line(exc)}") from None


def _lora(lora: LoraConfig, rank: int, base: Any, path: str | None) -> Any:
    import peft

    targets: str | list[str] = lora.target_modules
    if "," in lora.target_modules:
        targets = [t.strip() for t in lora.target_modules.split(",")]
    return peft.LoraConfig(
        r=rank,
        lora_alpha=lora.alpha if rank == lora.r else lora.alpha * rank / lora.r,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_dora=lora.dora,
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder(base) else "CAUSAL_LM",
        base_model_name_or_path=path,
    )


def _file_name(name: str) -> str:
    """Peft puts the adapter's own name, ``default``, into the module path but not the file."""
    if name.endswith(".lora_magnitude_vector.default.weight"):  # a module, for FSDP's sake
        return name.removesuffix(".default.weight")
    return name.replace(".default.", ".") if ".lora_" in name else name


def _model_files(base: Any) -> dict[str, str]:
    base.config.architectures = [type(base).__name__]
    with tempfile.TemporaryDirectory() as folder:
        base.config.save_pretrained(folder)
        if base.generation_config is not None:
            base.generation_config.save_pretrained(folder)
        return _texts(Path(folder))


def _adapter_files(model: Any, lora: LoraConfig) -> dict[str, str]:
    config = copy(model.peft_config["default"])
    config.inference_mode, config.r, config.lora_alpha = True, lora.r, lora.alpha
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return _texts(Path(folder))


def _tokenizer_files(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _texts(Path(folder))


def _texts(folder: Path) -> dict[str, str]:
    """Return the UTF-8 files of `folder`; binary ones (sentencepiece) have a JSON twin."""
    texts = {}
    for path in sorted(folder.iterdir()):
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, IsADirectoryError):
            continue
    return texts


def _first_line(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return (" ".join(lines[:2]) if lines else type(exc).__name__)[:400].rstrip(".")
