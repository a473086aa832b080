"""The loss, summed, so that any split of the batch adds up to the same number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from flwr_hpc.train.parallel.tensor_parallel import share_of_positions

IGNORED = -100
CHUNK_BYTES = 2**28  # Of float32 logits that exist at a time


def count_tokens(labels: Tensor) -> int:
    """Return on how many tokens of `labels` (sequences, length) the loss is taken.

    The first of a sequence never counts: a causal model has nothing before it, and a decoder
    starts from it.
    """
    return int((labels[:, 1:] != IGNORED).sum())


def next_tokens(labels: Tensor) -> Tensor:
    """Return what each position has to predict, from unshifted labels; nothing for the last."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross entropy of every target, in nats.

    Parameters
    ----------
    logits : Tensor (sequences, positions, vocabulary)
        Any floating-point type; the loss is taken in float32.
    targets : Tensor (sequences, positions), int64
        The next token of each position, or -100 where no loss is taken: see `next_tokens`.

    Returns
    -------
    Tensor (), float32
    """
    return cross_entropy(
        logits.flatten(0, 1).to(torch.float32),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def add_loss(
    model: Any, chunk_bytes: int = CHUNK_BYTES, tensor: DeviceMesh | None = None
) -> Callable[..., Tensor]:
    """Return what takes a batch through a model to the summed loss.

    That are ``(input_ids, labels, position_ids, attention_mask)``, the last two or None. Positions
    that restart keep what is before and behind apart: transformers masks attention by them. The
    mask is of what an encoder reads.

    Of long sequences or large vocabularies the logits are larger than the model. So the head
    runs chunk by chunk of the positions, and once more in the backward pass.

    Parameters
    ----------
    model : nn.Module
        Of transformers, causal or encoder-decoder, with or without peft, sharded or not.
    chunk_bytes : int
    tensor : DeviceMesh or None
        Ranks that split the layers: each returns the loss of its share of the positions.
    """

    def loss(
        model: Any,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if inner.config.is_encoder_decoder:
            decoding = _read_and_write(inner, input_ids, labels, attention_mask)
        else:
            decoding = _write_on(inner, input_ids, labels, position_ids)
        decoder, output, again, targets = decoding
        last, targets = share_of_positions(output.last_hidden_state, targets, tensor)
        sequences, length = targets.shape
        vocabulary = inner.get_output_embeddings().weight.shape[0]
        size = max(1, chunk_bytes // (4 * sequences * vocabulary))

        def head(hidden: Tensor, targets: Tensor) -> Tensor:
            with _decoded(decoder, output, hidden):
                return summed_loss(inner.forward(**again).logits, targets)

        hidden = torch.split(last, size, dim=1)
        chunks = zip(hidden, targets.split(size, 1), strict=True)  # type: ignore[no-untyped-call]
        if size >= length:
            return head(*next(chunks))
        return torch.stack([checkpoint(head, *c, use_reentrant=False) for c in chunks]).sum()

    model.summed_loss = MethodType(loss, model)
    register_fsdp_forward_method(model, "summed_loss")
    bound: Callable[..., Tensor] = model.summed_loss
    return bound


# What a model says before its head: its decoder, what that answers, how the model is called for
# the head alone once the answer is there, and the targets.
_Decoding = tuple[nn.Module, Any, dict[str, Any], Tensor]


def _write_on(
    model: Any, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None
) -> _Decoding:
    output = model.base_model(input_ids=input_ids, position_ids=position_ids)
    return model.base_model, output, {"input_ids": input_ids}, next_tokens(labels)


def _read_and_write(
    model: Any, input_ids: Tensor, labels: Tensor, mask: Tensor | None
) -> _Decoding:
    """Run encoder and decoder; the decoder sees the targets one place later."""
    targets = labels[:, 1:].contiguous()
    config = model.config
    shifted = pad(targets[:, :-1], (1, 0), value=config.decoder_start_token_id)
    shifted = shifted.masked_fill(shifted == IGNORED, config.pad_token_id)
    encoded = model.get_encoder()(input_ids=input_ids, attention_mask=mask)
    decoder = model.get_decoder()
    output = decoder(
        input_ids=shifted, encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=mask, use_cache=False,
    )  # fmt: skip
    return decoder, output, {"encoder_outputs": encoded, "decoder_input_ids": shifted}, targets


@contextmanager
def _decoded(decoder: nn.Module, output: Any, hidden: Tensor) -> Iterator[None]:
    """Have the decoder answer with `hidden`: what follows the head (a soft cap) is the model's."""
    answer = type(output)(**{**output, "last_hidden_state": hidden})
    decoder.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        del decoder.forward
