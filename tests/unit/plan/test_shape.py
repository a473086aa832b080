"""Parameter counts and what autograd keeps, against transformers' own models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from flwr_hpc.config.folder import conf_dir
from flwr_hpc.config.schema import LoraConfig
from flwr_hpc.config.validate import ENCODER_DECODERS
from flwr_hpc.errors import UserError
from flwr_hpc.plan.memory import saved_bytes
from flwr_hpc.plan.parallel import ParallelPlan
from flwr_hpc.plan.ranking import BYTE_VOCABULARY
from flwr_hpc.plan.shape import adapter_parameters, model_shape
from flwr_hpc.train.model import _lora

MODELS = sorted((conf_dir() / "model").glob("*.yaml"), key=lambda p: p.stem)
# As the checkpoints' model cards count them.
PUBLISHED = {
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "mistral_7b": 7_248_023_552,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "gpt2": 124_439_808,
    "gpt2_xl": 1_557_611_200,
    "gemma_2b": 2_506_172_416,
    "gemma2_9b": 9_241_705_984,
    "t5_base": 222_903_552,
}
SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 128, "max_position_embeddings": 512,
}  # fmt: skip
KEEPING = {
    "llama": SMALL,
    "qwen3": SMALL | {"head_dim": 32},
    "gemma": SMALL | {"head_dim": 32},
    "gemma2": SMALL | {"head_dim": 32},
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "gpt2": {
        "n_embd": 256, "n_head": 8, "n_positions": 512, "vocab_size": 128,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
}  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    return dict(config["config"])


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_parameters_are_those_of_transformers(path: Path) -> None:
    """Protects every number of a plan: all follow from the model's shape."""
    config = _config(path)
    shape = model_shape(config, BYTE_VOCABULARY)
    kind = config.pop("model_type")
    made = AutoConfig.for_model(kind, **{"vocab_size": BYTE_VOCABULARY} | config)
    auto = AutoModelForSeq2SeqLM if kind in ENCODER_DECODERS else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(made)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.parameters == PUBLISHED.get(path.stem, shape.parameters)


@pytest.mark.parametrize("kind", ["plain", "freeze_a", "dora"])
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_adapters_are_those_of_peft(path: Path, kind: str) -> None:
    """Protects what a dry run says of an adapter's way: that of the default targets."""
    config = _config(path)
    lora = LoraConfig(r=8, freeze_a=kind == "freeze_a", dora=kind == "dora")
    shape = replace(model_shape(config, BYTE_VOCABULARY), adapter_rank=lora.r)
    type_, few = config.pop("model_type"), {}
    for key in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"):
        if key in config:  # two layers tell all; peft takes long over eighty
            few[key] = 2
    made = AutoConfig.for_model(type_, **{"vocab_size": BYTE_VOCABULARY} | config | few)
    auto = AutoModelForSeq2SeqLM if type_ in ENCODER_DECODERS else AutoModelForCausalLM
    if (type_, kind) == ("mixtral", "dora"):
        pytest.skip("peft has no DoRA on experts")
    with torch.device("meta"):
        model = auto.from_config(made)
        adapted = peft.get_peft_model(model, _lora(lora, lora.r, model, None))
    parts = {"freeze_a": ["lora_B"], "dora": ["lora_A", "lora_B", "magnitude"]}
    wanted = parts.get(kind, ["lora_A", "lora_B"])
    found = sum(
        p.numel() for n, p in adapted.named_parameters() if any(part in n for part in wanted)
    )
    small = model_shape({"model_type": type_} | config | few, BYTE_VOCABULARY)
    assert adapter_parameters(replace(small, adapter_rank=lora.r), lora) == found
    per_layer = adapter_parameters(shape, lora) / shape.layers
    assert per_layer == adapter_parameters(replace(small, adapter_rank=8), lora) / small.layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KEEPING)
def test_activations_are_what_autograd_keeps(kind: str, dtype: torch.dtype) -> None:
    """Protects the memory prediction: a layer more keeps as much as is predicted, within 4 %."""
    layers = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    seq_len = 64
    kept = [_kept(kind, KEEPING[kind] | {layers: n}, dtype, seq_len) for n in (2, 4)]
    shape = model_shape(KEEPING[kind] | {"model_type": kind, layers: 1})
    plan = ParallelPlan(1, 1, 1, 1, 1, "none")
    lengths = shape.lengths(seq_len)
    expected = saved_bytes(shape.blocks[0], plan, lengths, dtype.itemsize) / seq_len
    assert expected == pytest.approx((kept[1] - kept[0]) / 2, rel=0.04)


def _kept(kind: str, config: dict[str, Any], dtype: torch.dtype, seq_len: int) -> float:
    """Return the bytes per token that a forward pass leaves for the backward pass."""
    made = AutoConfig.for_model(kind, **config, use_cache=False)
    model = AutoModelForCausalLM.from_config(made, dtype=dtype).train()
    ids = torch.zeros(2, seq_len, dtype=torch.long)
    return _left(model, input_ids=ids) / (2 * seq_len)


def _left(model: Any, **inputs: torch.Tensor) -> int:
    """Return the bytes that a forward pass leaves for the backward pass."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no storage's address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.base_model(**inputs)
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_a_decoder_works_on_its_own_tokens(kind: str, dtype: torch.dtype) -> None:
    """Protects plans of encoder-decoders, whose targets are a fraction of what is read: products
    within 3 %; no layer keeps more than is predicted, nor three quarters of it or less."""
    sizes = {"d_model": 256, "d_kv": 32, "d_ff": 640, "num_heads": 8, "vocab_size": 128}
    read = torch.zeros(2, 80, dtype=torch.long)
    written = torch.ones(2, 28, dtype=torch.long)

    def model(encoders: int, decoders: int) -> Any:
        made = AutoConfig.for_model(
            kind, **sizes, num_layers=encoders, num_decoder_layers=decoders, dropout_rate=0.0,
            use_cache=False, decoder_start_token_id=0, pad_token_id=0,
        )  # fmt: skip
        return AutoModelForSeq2SeqLM.from_config(made, dtype=dtype).train()

    def kept(encoders: int, decoders: int) -> float:
        return _left(model(encoders, decoders), input_ids=read, decoder_input_ids=written) / 2

    shape = replace(model_shape({**sizes, "model_type": kind, "num_layers": 1}), target_len=28)
    plan, lengths = ParallelPlan(1, 1, 1, 1, 1, "none"), shape.lengths(80)
    for block, more in zip(shape.blocks, ((2, 1), (1, 2)), strict=True):
        found = kept(*more) - kept(1, 1)
        assert found <= 1.01 * saved_bytes(block, plan, lengths, dtype.itemsize) <= 1.33 * found
    with FlopCounterMode(display=False) as counter:
        model(1, 1)(input_ids=read, labels=written).loss.backward()
    assert shape.flops_per_token(80) * 80 == pytest.approx(counter.get_total_flops() / 2, rel=0.03)


def test_experts_that_rest_cost_memory_but_no_time() -> None:
    """Protects a mixture's prediction: two of eight experts work on a token."""
    shape = model_shape(_config(conf_dir() / "model" / "mixtral_8x7b.yaml"))
    assert shape.parameters / 1e9 == pytest.approx(46.7, abs=0.05)
    assert shape.multiplied / 1e9 == pytest.approx(12.7, abs=0.1)


def test_a_family_that_is_not_known_is_refused() -> None:
    """Protects from a plan for a shape that was guessed."""
    with pytest.raises(UserError, match=r"model_type=mamba cannot be planned.*Known: gemma"):
        model_shape({"model_type": "mamba"})


def test_a_size_that_is_missing_is_named() -> None:
    """Protects users from a plan for a default they did not choose."""
    with pytest.raises(UserError, match=r"llama lacks num_attention_heads or n_head"):
        model_shape({"model_type": "llama", "hidden_size": 64, "vocab_size": 9})
