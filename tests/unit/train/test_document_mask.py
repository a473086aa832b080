"""A document in a packed sequence is to the model what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from worlds.train.torch_ranks import LLAMA, VOCABULARY, tiny_model

from flwr_hpc.config.schema import DataConfig, TrainConfig
from flwr_hpc.errors import UserError
from flwr_hpc.train.load import check_document_mask
from flwr_hpc.train.loss import IGNORED, add_loss

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-eager": {**LLAMA, "attn_implementation": "eager"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    | {"model_type": "gpt_neox"},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 3},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "gemma": {**LLAMA, "model_type": "gemma", "head_dim": 16},
    "gemma2": {**LLAMA, "model_type": "gemma2", "head_dim": 16, "sliding_window": 3},
}
LENGTHS = [(5, 1, 6), (12,), (3, 9)]  # of the documents in each of three sequences


def _documents() -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [[torch.randint(0, VOCABULARY, (n,), generator=draw) for n in row] for row in LENGTHS]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_document_equals_the_document_alone(name: str) -> None:
    """Logits and loss, for every family of decoders in conf/model."""
    model, documents = tiny_model(model=FAMILIES[name]).model.eval(), _documents()
    ids = torch.stack([torch.cat(row) for row in documents])
    places = torch.tensor([[i for n in row for i in range(n)] for row in LENGTHS])
    labels = ids.masked_fill(places == 0, IGNORED)
    loss = add_loss(model)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=places).logits
        summed = loss(ids, labels, places)
        alone = [[model(input_ids=d[None]).logits[0] for d in row] for row in documents]
        losses = [loss(d[None], d[None]) for row in documents for d in row]
        across = model(input_ids=ids).logits
    expected = torch.stack([torch.cat(row) for row in alone])
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(summed, sum(losses), rtol=1e-5, atol=0)
    assert (across - expected).abs().max() > 1e-3  # what it would be without


def test_an_attention_without_a_mask_is_refused() -> None:
    """Flash attention takes positions of one sequence, and ignores those of several."""
    model = tiny_model().model
    check_document_mask(model, DataConfig(), TrainConfig())
    model.config._attn_implementation_internal = "flash_attention_2"  # type: ignore[union-attr]
    check_document_mask(model, DataConfig(), TrainConfig(micro_batch=1))
    check_document_mask(model, DataConfig(document_mask=False), TrainConfig())
    with pytest.raises(UserError, match=r"attn_implementation=flash_attention_2.*micro_batch=1"):
        check_document_mask(model, DataConfig(), TrainConfig())
