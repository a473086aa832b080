"""What is drawn layer by layer is what transformers would have drawn, with every buffer right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from worlds.train.loading_scenarios import drawn_apart
from worlds.train.torch_ranks import LLAMA, tiny_model

from flwr_hpc.errors import UserError
from flwr_hpc.train.random_weights import RandomWeights

SIZES = {k: v for k, v in LLAMA.items() if k != "model_type"} | {"hidden_size": 64}
SPANS = {"d_model": 64, "d_kv": 16, "d_ff": 44, "num_layers": 2, "num_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2"), SIZES),
    **{family: {**SIZES, "head_dim": 16} for family in ("qwen3", "gemma", "gemma2")},
    "gpt_neox": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "mixtral": {**SIZES, "num_local_experts": 2}, "t5": SPANS, "mt5": SPANS,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_drawn_as_by_transformers(family: str) -> None:
    """Buffers equal; weights of the same spread, constants the same, tied ones tied."""
    model = {"model_type": family, **FAMILIES[family]}
    expected = tiny_model(model=model).model
    with drawn_apart():
        found = tiny_model(model=model).model
    for (name, own), (theirs, other) in zip(
        found.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert name == theirs
        assert torch.equal(own, other), name
    spreads = []
    for (name, own), (theirs, other) in zip(
        found.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == theirs
        assert own.requires_grad
        if other.std() == 0:
            assert torch.equal(own, other), name
        elif own.numel() > 1000:
            spreads.append(float((own.std() / other.std()).detach()))
            assert not torch.equal(own, other)
    assert len(spreads) > 4
    assert 0.8 < min(spreads) <= max(spreads) < 1.25


def test_layers_differ_and_the_seed_decides() -> None:
    """Protects from layers that all begin with the same numbers."""
    with drawn_apart():
        one, again, other = (tiny_model(seed=seed).model for seed in (0, 0, 1))
    name = "model.layers.{}.mlp.up_proj.weight"
    first, second = (one.get_parameter(name.format(i)) for i in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, again.get_parameter(name.format(0)))
    assert not torch.equal(first, other.get_parameter(name.format(0)))


def test_a_small_model_is_drawn_as_ever() -> None:
    """Counting its parameters first takes nothing from the stream of random numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = AutoConfig.for_model(**LLAMA, **special, vocab_size=67)
    expected = AutoModelForCausalLM.from_config(config)
    found = tiny_model(tied=False).model
    for own, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(own, other)


def test_what_transformers_does_not_draw_is_refused() -> None:
    """Protects from weights that are whatever lay in memory."""
    with drawn_apart():
        model: Any = tiny_model(draw_later=True).model
    with torch.device("meta"):
        model.model.layers[1].own = nn.ParameterList([torch.empty(3)])
    with pytest.raises(UserError, match=r"model_type=llama cannot begin.*'own.0'.*model.path=PATH"):
        RandomWeights(model, list(model.model.layers), 0).draw(model)
