"""Span corruption takes nothing away but what the decoder is to write, the same everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.data.batches import load_corpus, load_tokenizer
from flwr_hpc.data.packing import IGNORED
from flwr_hpc.data.span_corruption import span_corruption
from flwr_hpc.errors import UserError

BYTES = load_tokenizer("byte", sentinels=True)


def _restored(inputs: list[int], targets: list[int], sentinels: set[int]) -> list[int]:
    """Put what the decoder wrote back where it was."""
    runs: dict[int, list[int]] = {}
    for token in targets[1:-1]:
        if token in sentinels:
            runs[last := token] = []
        else:
            runs[last].append(token)
    restored = []
    for token in inputs[:-1]:
        restored += runs[token] if token in sentinels else [token]
    return restored


@pytest.mark.parametrize("seq_len", [8, 33, 64, 512])
def test_inputs_and_targets_hold_every_token_once(seq_len: int) -> None:
    """Protects the text: nothing is lost or said twice, and 15 % of it is to be written."""
    made = span_corruption(seq_len, BYTES)
    ids = np.random.default_rng(0).integers(3, 259, (4, made.length))
    inputs, targets = made.batch(ids, [1, 2, 0], np.arange(4))
    assert inputs.shape == (4, seq_len)
    assert targets.shape == (4, 1 + made.target_length)
    assert (targets[:, 0] == IGNORED).all()
    assert made.noise == max(1, round(0.15 * made.length))
    for row in range(4):
        whole = _restored(inputs[row].tolist(), targets[row].tolist(), {*made.sentinels.tolist()})
        assert whole == ids[row].tolist()


def test_a_place_in_the_stream_is_always_corrupted_alike() -> None:
    """Protects resuming and other numbers of ranks; another epoch, facility or seed differs."""
    made = span_corruption(64, BYTES)
    ids = np.tile(np.arange(3, 3 + made.length), (3, 1))
    inputs, _ = made.batch(ids, [1, 2, 0], np.array([5, 6, 7]))
    alone, _ = made.batch(ids[:1], [1, 2, 0], np.array([6]))
    assert (alone[0] == inputs[1]).all()
    assert (inputs[0] != inputs[1]).any()
    assert (made.batch(ids[:1], [2, 2, 0], np.array([6]))[0] != alone).any()
    # For all time, on every machine.
    assert np.flatnonzero(alone[0] >= 259).tolist() == EXPECTED


EXPECTED = [12, 28, 62]


def test_too_few_sentinels_are_named() -> None:
    """Protects from sequences that the tokenizer cannot mark."""
    with pytest.raises(UserError, match=r"corrupted in \d+ places, but the tokenizer has 125"):
        span_corruption(8192, BYTES)
    with pytest.raises(UserError, match="Name that of a T5 or mT5"):
        span_corruption(64, load_tokenizer("byte"))


def test_a_corpus_is_corrupted(tmp_path: Path) -> None:
    """Protects the way from files to batches: whole sequences only, counted by what is written."""
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    data = DataConfig(
        "text", {"a": [str(tmp_path / "*.txt")]}, seq_len=64, objective="span_corruption"
    )
    corpus = load_corpus(data, "a", ["a"], seed=1)
    batch = corpus.batch(0, 3)
    assert corpus.corruption is not None
    assert batch.input_ids.shape == (3, 64)
    assert batch.labels.shape == (3, 1 + corpus.corruption.target_length)
    assert corpus.train_tokens == len(corpus.train) * corpus.corruption.target_length
    counted = sum(int((b.labels != IGNORED).sum()) for b in corpus.held_out(0, 1, 2))
    assert counted == corpus.held_out_tokens > 0
    epoch = len(corpus.train)
    again = next(i for i in range(epoch, 2 * epoch) if corpus.rows(i, 1) == corpus.rows(0, 1))
    assert (corpus.batch(again, 1).input_ids != batch.input_ids[:1]).any()


def test_records_of_prompt_and_completion_are_refused(tmp_path: Path) -> None:
    """Protects from completions that would be corrupted as if they were text."""
    lines = [f'{{"prompt": "{i}?", "completion": "{i}!"}}' for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = DataConfig("jsonl", {"a": [str(tmp_path / "a.jsonl")]}, objective="span_corruption")
    words = r"a.jsonl, line 1: .* takes documents, found 'prompt' and .*data.objective=seq2seq"
    with pytest.raises(UserError, match=words):
        load_corpus(data, "a", ["a"], seed=1)
