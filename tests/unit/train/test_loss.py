"""The summed loss equals that of transformers, and holds few float32 logits at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from worlds.train.torch_ranks import LLAMA, SEQ_LEN, VOCABULARY, tiny_model

from flwr_hpc.train.loss import IGNORED, add_loss, count_tokens, next_tokens, summed_loss

FOUR_POSITIONS = 4 * 3 * VOCABULARY * 4  # bytes of float32 logits, of three sequences


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor of logits that any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            logits = isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,)
            if logits and tensor.shape[0] != LLAMA["hidden_size"]:  # that is the head itself
                self.elements = max(self.elements, tensor.numel())
        return out


def _sequences() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = labels[2, 9:] = IGNORED
    return ids, labels


# The last: a soft cap behind the head, which is the model's business.
GEMMA = {
    "model_type": "gemma2", "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "final_logit_softcapping": 0.05,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
MOE = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4,
}  # fmt: skip


@pytest.mark.parametrize("model", [None, GPT2, MOE, GEMMA], ids=["llama", "gpt2", "moe", "softcap"])
@pytest.mark.parametrize("chunk_bytes", [2**28, FOUR_POSITIONS])
def test_loss_and_gradients_are_those_of_transformers(
    model: dict[str, Any] | None, chunk_bytes: int
) -> None:
    """Shifted once, ignoring -100, whatever the chunks and whatever follows the head."""
    built, (ids, labels) = tiny_model(model=model).model.eval(), _sequences()
    expected = built(input_ids=ids, labels=labels).loss  # type: ignore[operator]
    expected.backward()
    grads = {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}
    built.zero_grad()
    mean = add_loss(built, chunk_bytes)(ids, labels) / count_tokens(labels)
    mean.backward()  # type: ignore[no-untyped-call]
    assert float(mean.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in built.named_parameters():
        if name in grads:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-7)


T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 44, "num_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("chunk_bytes", [2**28, FOUR_POSITIONS])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_loss_of_an_encoder_decoder_is_that_of_transformers(
    feed_forward: str, chunk_bytes: int
) -> None:
    """Protects span corruption: the decoder sees the targets one place later, -100 never."""
    model = {**T5, "feed_forward_proj": feed_forward}
    built, (ids, labels) = tiny_model(model=model).model.eval(), _sequences()
    targets = labels[:, 1:9].contiguous()  # fewer than the encoder reads
    expected = built(input_ids=ids, labels=targets).loss  # type: ignore[operator]
    expected.backward()
    grads = {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}
    built.zero_grad()
    mean = add_loss(built, chunk_bytes)(ids, labels[:, :9]) / count_tokens(labels[:, :9])
    mean.backward()  # type: ignore[no-untyped-call]
    assert float(mean.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


def test_logits_exist_a_chunk_at_a_time() -> None:
    """Protects the memory of a GPU: 8B at 8192 tokens has more logits than weights."""
    built, (ids, labels) = tiny_model(tied=False).model, _sequences()
    loss = add_loss(built, FOUR_POSITIONS)
    with LargestTensor() as largest:
        loss(ids, labels).backward()  # type: ignore[no-untyped-call]
    assert 0 < largest.elements <= FOUR_POSITIONS // 4


def test_the_loss_copies_no_logits() -> None:
    """Labels are shifted, not logits, which are a hundred thousand times as large."""
    logits = torch.randn(3, SEQ_LEN, VOCABULARY)
    made: list[int] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if "clone" in str(func) or "copy" in str(func):
                made.append(out.numel())
            return out

    targets = next_tokens(_sequences()[1])
    with Made():
        summed_loss(logits, targets)
    assert not made


def test_the_loss_adds_up_over_sequences() -> None:
    """However the batch is split: the sum is the same."""
    built, (ids, labels) = tiny_model().model, _sequences()
    loss = add_loss(built)
    with torch.no_grad():
        whole = float(loss(ids, labels))
        apart = sum(float(loss(ids[i : i + 1], labels[i : i + 1])) for i in range(3))
    assert apart == pytest.approx(whole, rel=1e-6)


def test_a_sequence_without_labels_costs_nothing() -> None:
    """No NaN from a division by zero."""
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = summed_loss(logits, torch.full((1, 4), IGNORED))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
