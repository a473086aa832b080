"""The goldfish loss: which tokens are left out."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.data.batches import Batch, Corpus
from flwr_hpc.data.packing import Sequences, Tokens
from flwr_hpc.errors import UserError
from flwr_hpc.train.goldfish import left_out, training_batch
from flwr_hpc.train.loss import IGNORED, count_tokens, next_tokens, summed_loss


def _tokens(rows: int = 4, length: int = 512, vocabulary: int = 50_000) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (rows, length)))


def _reference(ids: list[int], k: int, h: int) -> list[bool]:
    """Compute the mask of one sequence with Python's exact integers."""
    prime, dropped = 2**31 - 1, []
    for i in range(len(ids)):
        key = 0
        for token in ids[max(0, i - h) : i]:
            key = (key * 1_103_515_245 + token + 1) % prime
        for mixer in (1_597_334_677, 747_796_405):
            key = ((key ^ (key >> 15)) % prime) * mixer % prime
        dropped.append(i >= h and key * k < prime)
    return dropped


@pytest.mark.parametrize(("k", "h"), [(4, 13), (2, 1), (3, 50), (32, 7)])
def test_mask_is_exact_integer_arithmetic(k: int, h: int) -> None:
    """Protects facilities from masks that depend on the device: the largest ids do not overflow."""
    ids = _tokens(2, 200, vocabulary=2**31 - 2)
    expected = [_reference(row.tolist(), k, h) for row in ids]
    assert left_out(ids, k, h).tolist() == expected


def test_mask_never_changes() -> None:
    """Protects resumed runs and old facilities: another mask would show them what was left out."""
    mask = left_out(_tokens(), 4, 13)
    digest = hashlib.sha256(np.packbits(mask.numpy()).tobytes()).hexdigest()
    assert digest[:16] == "4cb07ed9c986447d"


@pytest.mark.parametrize("k", [2, 4, 8])
def test_about_every_kth_token_is_left_out(k: int) -> None:
    """Protects the share, also of text of few different tokens; the first h are kept."""
    for vocabulary in (259, 50_000):
        mask = left_out(_tokens(16, 2048, vocabulary), k, 13)
        assert not mask[:, :13].any()
        assert mask[:, 13:].double().mean() == pytest.approx(1 / k, rel=0.05)


def test_a_passage_is_masked_alike_wherever_it_comes() -> None:
    """Protects the purpose: what is left out once is left out at every repetition."""
    ids = _tokens(2, 400)
    ids[1, 150:300] = ids[0, 50:200]
    mask = left_out(ids, 4, 13)
    assert mask[0, 63:200].equal(mask[1, 163:300])
    assert mask[0, 63:200].any()


def _packed(rows: list[list[Tokens]], document_mask: bool) -> Batch:
    """Return sequences of documents as the data give them, one after the other."""
    ids = np.stack([np.concatenate(row) for row in rows])
    ends = np.cumsum([len(document) for row in rows for document in row])
    starts = ends[ends % ids.shape[1] > 0]
    spans = np.tile(np.array([[1, ids.shape[1]]], np.int32), (len(rows), 1))
    made = Sequences(ids, spans, starts)
    corpus = Corpus(None, "a", 0, made, made, len(rows), document_mask=document_mask)
    return next(corpus.held_out(0, 1, len(rows)))


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_document_is_masked_alike_wherever_it_is_packed(document_mask: bool) -> None:
    """Protects short passages: what stands before them in a sequence must not change the mask."""
    documents = [row.numpy().astype(np.uint16) for row in _tokens(6, 120)]
    passage = documents.pop()
    rows = [
        [passage, documents[0]],
        [documents[1][:7], passage, documents[2][:113]],
        [documents[3], passage],
    ]
    config = TrainConfig(loss="goldfish", goldfish_h=13)
    kept = training_batch(_packed(rows, document_mask), config)
    alone = training_batch(Batch(*[torch.from_numpy(passage.astype(np.int64))[None]] * 2), config)
    expected = alone.labels[0, 1:]  # nothing, or another document, predicts the first
    assert 10 < int((expected == IGNORED).sum()) < 60
    for row, begin in enumerate((0, 7, 120)):
        assert kept.labels[row, begin + 1 : begin + 120].equal(expected)
    assert (kept.position_ids is not None) == document_mask


def test_the_target_itself_does_not_count_but_the_order_does() -> None:
    """Protects from the reference code's traps: a window with the target, and a product of ids."""
    ids = torch.stack([torch.randperm(900) for _ in range(200)])[:, :14]
    before = left_out(ids, 2, 13)[:, 13]
    other = ids.clone()
    other[:, 13] += 1
    assert left_out(other, 2, 13)[:, 13].equal(before)
    turned = torch.cat([ids[:, :13].flip(1), ids[:, 13:]], dim=1)
    assert 60 < int((left_out(turned, 2, 13)[:, 13] != before).sum()) < 140
    ids[:, 0] = 0  # would make every product 0
    assert 0.3 < left_out(ids, 2, 13)[:, 13].double().mean() < 0.7


def test_loss_is_the_papers() -> None:
    """Protects the formula: the mean over the tokens that are kept."""
    torch.manual_seed(0)
    ids = _tokens(3, 64, 100)
    batch = Batch(ids, ids.clone())
    config = TrainConfig(loss="goldfish", goldfish_k=3, goldfish_h=5)
    kept = training_batch(batch, config)
    logits = torch.randn(3, 64, 100)
    loss = summed_loss(logits, next_tokens(kept.labels)) / count_tokens(kept.labels)
    each = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    mask = torch.tensor([[not d for d in _reference(r.tolist(), 3, 5)] for r in ids])[:, 1:]
    torch.testing.assert_close(loss, each[mask.flatten()].mean())
    assert batch.labels.equal(ids), "the batch itself is not changed"


def test_what_has_no_loss_anyway_stays_so() -> None:
    """Protects prompts and padding, and the plain loss."""
    ids = _tokens(1, 64)
    labels = ids.clone()
    labels[:, :40] = IGNORED
    kept = training_batch(Batch(ids, labels), TrainConfig(loss="goldfish"))
    assert (kept.labels[:, :40] == IGNORED).all()
    plain = Batch(ids, labels)
    assert training_batch(plain, TrainConfig()) is plain


def test_settings_are_checked() -> None:
    """Protects from a run that learns nothing, and from a misspelt loss."""
    train = compose_config(["train.loss=goldfish", "train.goldfish_k=8"]).train
    assert (train.loss, train.goldfish_k) == ("goldfish", 8)
    assert replace(train, loss="cross_entropy") != train
    with pytest.raises(UserError, match=r"train\.goldfish_k=1 must lie between 2"):
        compose_config(["train.loss=goldfish", "train.goldfish_k=1"])
    with pytest.raises(UserError, match=r"train\.loss=goldfsh is not known. Did you mean"):
        compose_config(["train.loss=goldfsh"])
