"""Batches: packing and masks exact, the same everywhere, divided among ranks without loss."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.data import packing
from flwr_hpc.data.batches import (
    Batch,
    Corpus,
    DataCursor,
    check_tokenizer,
    load_corpus,
    load_tokenizer,
)
from flwr_hpc.errors import UserError

PAD, EOS = 0, 1


def tokens(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def load(kind: str, *paths: Path, held: Path | None = None, **more: object) -> Corpus:
    data = DataConfig(
        kind=kind,
        paths={"a": [str(p) for p in paths]},
        held_out_paths={"a": [str(held)]} if held else {},
        **more,  # type: ignore[arg-type]
    )
    return load_corpus(data, "a", ["a", "b"], seed=1)


def jsonl(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def texts(tmp_path: Path, *documents: str) -> list[Path]:
    paths = [tmp_path / f"{i}.txt" for i in range(len(documents))]
    for path, document in zip(paths, documents, strict=True):
        path.write_text(document)
    return paths


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Return 11 training and 5 held-out sequences of 8 tokens, all different."""
    held = tmp_path / "held.txt"
    held.write_text("".join(chr(97 + i % 26) for i in range(34)))
    (train,) = texts(tmp_path, "".join(chr(200 + i) for i in range(44)))
    return load("text", train, held=held, seq_len=8)


def test_byte_encoding_agrees_with_byt5() -> None:
    """Our fast encoding is the slow tokenizer's, so a saved model's tokenizer fits its data."""
    from flwr_hpc.data.encoding import _encoder

    tokenizer = load_tokenizer("byte")
    text = "def f(x):\n\treturn 'é€😀' \x00\x7f\n"
    (ours,) = _encoder(tokenizer)([text])
    assert ours.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (259, PAD, EOS)


def test_packing_is_exact(tmp_path: Path) -> None:
    """Documents follow each other with eos between; an incomplete last sequence is dropped."""
    train = texts(tmp_path, "abc", "defgh", "ij")
    held = tmp_path / "held"
    held.write_text("xyz")
    corpus = load("text", *train, held=held, seq_len=4)
    stream = [*tokens("abc"), EOS, *tokens("defgh"), EOS, *tokens("ij"), EOS]
    assert corpus.train.ids.ravel().tolist() == stream[:12]
    assert corpus.train.ids.dtype == np.uint16
    assert corpus.train_tokens == 3 * 3 - 1  # nothing predicts the first of "ij"
    assert corpus.held.ids.tolist() == [[*tokens("xyz"), EOS]]


def test_every_held_out_token_is_predicted_once(tmp_path: Path) -> None:
    """Sequences overlap by one token and the last is padded without loss."""
    held = tmp_path / "held"
    held.write_text("abcdefgh")
    corpus = load("text", *texts(tmp_path, "0123456789"), held=held, seq_len=4)
    (batch,) = corpus.held_out(0, 1, 10)
    assert batch.input_ids.tolist() == [
        tokens("abcd"),
        tokens("defg"),
        [*tokens("gh"), EOS, PAD],
    ]
    assert batch.labels.tolist() == [
        [-100, *tokens("bcd")],
        [-100, *tokens("efg")],
        [-100, *tokens("h"), EOS, -100],
    ]
    assert corpus.held_out_tokens == 8  # nine with eos, less the very first


def test_documents_in_a_sequence_are_kept_apart(tmp_path: Path) -> None:
    """Positions restart with each document, and nothing predicts its first token."""
    path = jsonl(
        tmp_path / "x.jsonl",
        *({"text": text} for text in ("ab", "c", "defghi")),
        {"prompt": "p", "completion": "q"},
    )
    held = jsonl(tmp_path / "h.jsonl", {"text": "uvwx"}, {"text": "yz"}, {"text": "!"})
    corpus = load("jsonl", path, held=held, seq_len=6)
    rows = {tuple(b.input_ids[0].tolist()): b for b in (corpus.batch(i, 1) for i in range(3))}
    first = rows[(*tokens("ab"), EOS, *tokens("c"), EOS, *tokens("d"))]
    assert first.position_ids is not None
    assert first.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert first.labels.tolist() == [[-100, *tokens("b"), EOS, -100, EOS, -100]]
    second = rows[(*tokens("efghi"), EOS)]
    assert second.position_ids is None  # one document: nothing to keep apart
    assert second.labels.tolist() == [[-100, *tokens("fghi"), EOS]]
    assert corpus.train_tokens == 3 + 5 + 2
    (batch,) = corpus.held_out(0, 1, 10)
    assert batch.position_ids is not None
    assert batch.input_ids.tolist() == [
        [*tokens("uvwx"), EOS, *tokens("y")],
        [*tokens("yz"), EOS, *tokens("!"), EOS, PAD],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 0, 1, 2]]
    assert batch.labels.tolist() == [
        [-100, *tokens("vwx"), EOS, -100],
        [-100, *tokens("z"), EOS, -100, EOS, -100],
    ]
    assert corpus.held_out_tokens == 4 + 3
    across = load("jsonl", path, held=held, seq_len=6, document_mask=False)
    assert across.batch(0, 3).position_ids is None
    assert across.train_tokens == corpus.train_tokens + 2
    assert across.held_out_tokens == corpus.held_out_tokens + 2


def test_prompt_and_completion_masks_are_exact(tmp_path: Path) -> None:
    """One record each; loss on completion and eos; long ones cut, hopeless left out, both said."""
    path = jsonl(
        tmp_path / "x.jsonl",
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completion": "cdefgh"},
        {"prompt": "", "completion": "cd"},
        {"prompt": "much too long", "completion": "x"},
    )
    corpus = load("jsonl", path, held=jsonl(tmp_path / "h.jsonl", {"text": "held"}), seq_len=6)
    labels = packing.labels(corpus.train.ids, corpus.train.spans)
    assert corpus.train.ids.tolist() == [
        [*tokens("abcd"), EOS, PAD],
        tokens("abcdef"),
        [*tokens("cd"), EOS, PAD, PAD, PAD],
    ]
    assert labels.tolist() == [
        [-100, -100, *tokens("cd"), EOS, -100],
        [-100, -100, *tokens("cdef")],
        [-100, *tokens("d"), EOS, -100, -100, -100],
    ]
    assert corpus.train_tokens == 3 + 4 + 2
    assert corpus.too_long == (
        "records of more tokens than data.seq_len=6: 1 cut, 1 left out, as nothing to learn was "
        "left of them"
    )
    long = jsonl(tmp_path / "y.jsonl", {"prompt": "much too long", "completion": "x"})
    with pytest.raises(UserError, match=r"1 record\(s\) had nothing to learn.*raise data.seq_len"):
        load("jsonl", long, held=jsonl(tmp_path / "h.jsonl", {"text": "held"}), seq_len=6)


def test_records_are_held_out_by_content(tmp_path: Path) -> None:
    """Equal records stand on one side, so nothing held out was trained on."""
    records: list[dict[str, object]] = [{"text": f"record {i % 50}"} for i in range(100)]
    corpus = load("jsonl", jsonl(tmp_path / "x.jsonl", *records), seq_len=8, held_out_fraction=0.2)
    decode = corpus.tokenizer.decode
    sides = [
        {r for r in decode(part.ids.ravel(), skip_special_tokens=False).split("</s>") if len(r) > 8}
        for part in (corpus.train, corpus.held)
    ]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert 0.05 < corpus.held.ids.size / (corpus.held.ids.size + corpus.train.ids.size) < 0.4


def test_one_distinct_record_is_too_few(tmp_path: Path) -> None:
    """There must be something to train on and something to hold out."""
    path = jsonl(tmp_path / "x.jsonl", {"text": "same"}, {"text": "same"})
    with pytest.raises(UserError, match=r"facility a: found 1 distinct record.*data.held_out_p"):
        load("jsonl", path, seq_len=2)


def test_parquet_and_jsonl_give_the_same(tmp_path: Path) -> None:
    """The format of the file changes nothing."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [f"document number {i}" for i in range(30)]
    pq.write_table(pa.table({"text": rows, "id": range(30)}), tmp_path / "x.parquet")
    one = load("jsonl", jsonl(tmp_path / "x.jsonl", *({"text": r} for r in rows)), seq_len=16)
    two = load("parquet", tmp_path / "x.parquet", seq_len=16)
    assert np.array_equal(one.train.ids, two.train.ids)
    assert np.array_equal(one.held.ids, two.held.ids)


def test_faults_behind_the_preflight_are_told_alike(tmp_path: Path) -> None:
    """The job names facility, file and line too, whatever its reader says."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": \n')
    with pytest.raises(UserError, match=r"facility a: .*x.jsonl, line 3: not valid JSON"):
        load("jsonl", path, seq_len=4)
    jsonl(path, {"text": "one"}, {"txt": "two"})
    with pytest.raises(UserError, match=r"facility a: .*x.jsonl, line 2: needs 'text'"):
        load("jsonl", path, seq_len=4)
    latin = tmp_path / "x.txt"
    latin.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"facility a: .*x.txt, line 2: not UTF-8"):
        load("text", latin, seq_len=4)


def test_tails_of_few_documents_are_held_out(tmp_path: Path) -> None:
    """A single book is cut in two."""
    corpus = load("text", *texts(tmp_path, "0123456789" * 10), seq_len=5, held_out_fraction=0.2)
    stream = [*tokens("0123456789" * 8), EOS]
    assert corpus.train.ids.ravel().tolist() == stream[:80]
    assert corpus.held_out_tokens == 20


def test_too_little_data_is_told_with_numbers(tmp_path: Path) -> None:
    """Less than one sequence cannot be trained on."""
    with pytest.raises(UserError, match=r"facility a: the data to train on \(1 file\(s\), 40 byt"):
        load("text", *texts(tmp_path, "x" * 40), seq_len=64)


def test_ranks_share_what_one_process_sees(corpus: Corpus) -> None:
    """2 ranks of 4 = 1 process of 8, over several epochs."""
    for step in range(5):
        cursor = DataCursor(8 * step)
        whole = corpus.batch(cursor.first(0, 8), 8)
        halves = [corpus.batch(cursor.first(rank, 4), 4) for rank in range(2)]
        for name in ("input_ids", "labels"):
            both = torch.cat([getattr(half, name) for half in halves])
            assert torch.equal(getattr(whole, name), both)


@pytest.mark.parametrize("seed", range(20))
def test_no_series_of_jobs_shows_a_sequence_twice_or_never(corpus: Corpus, seed: int) -> None:
    """What was trained on is what one undisturbed job sees, whatever sizes and kills come."""
    draw = random.Random(seed)
    saved, kept = DataCursor(), Counter[int]()
    for _ in range(30):  # jobs, each of its own size, from the last checkpoint
        ranks, per_rank = draw.choice([1, 2, 3, 4, 8]), draw.choice([1, 2, 5])
        cursor, seen = dataclasses.replace(saved), Counter[int]()
        for _ in range(draw.randrange(6)):
            for rank in range(ranks):
                seen.update(corpus.rows(cursor.first(rank, per_rank), per_rank).tolist())
            cursor.advance(ranks, per_rank)
            if draw.random() < 0.5:  # a checkpoint; what comes after it is lost with a kill
                saved, kept, seen = dataclasses.replace(cursor), kept + seen, Counter()
    assert saved.sequences > 3 * len(corpus.train)
    assert kept == Counter(corpus.rows(0, saved.sequences).tolist())


def test_each_epoch_is_complete_and_reshuffled(corpus: Corpus) -> None:
    """The cursor meets every sequence once per epoch, in a new order each time."""
    count = len(corpus.train)
    assert count == 11
    seen = [tuple(corpus.batch(s, 1).input_ids[0].tolist()) for s in range(2 * count)]
    assert len(set(seen[:count])) == count
    assert Counter(seen[:count]) == Counter(seen[count:])
    assert seen[:count] != seen[count:]


def test_order_is_pinned(corpus: Corpus) -> None:
    """Another machine, another numpy: the same batches from the same seed."""
    from flwr_hpc.data.batches import _epoch_order

    assert _epoch_order(0, "local_a", 0, 8).tolist() == PINNED
    again = dataclasses.replace(corpus)
    other = dataclasses.replace(corpus, seed=corpus.seed + 1)
    assert torch.equal(corpus.batch(24, 8).input_ids, again.batch(24, 8).input_ids)
    assert not torch.equal(corpus.batch(24, 8).input_ids, other.batch(24, 8).input_ids)


PINNED = [6, 5, 3, 1, 2, 7, 4, 0]


@pytest.mark.parametrize(("ranks", "sequences"), [(1, 2), (2, 1), (2, 2), (3, 2), (7, 1)])
def test_held_out_is_divided_without_loss(corpus: Corpus, ranks: int, sequences: int) -> None:
    """All ranks run equally many forward passes, and each token counts once."""
    shares = [list(corpus.held_out(rank, ranks, sequences)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert all(len(batch.input_ids) for batch in batches)
    counted = sum(int((batch.labels != -100).sum()) for batch in batches)
    assert counted == corpus.held_out_tokens == corpus.held.tokens == 34


def test_held_out_is_bounded_and_spread(corpus: Corpus) -> None:
    """A part of a large held-out set comes from all over it."""
    part = dataclasses.replace(corpus, held_out_sequences=2)
    (batch,) = part.held_out(0, 1, 10)
    assert batch.input_ids.tolist() == corpus.held.ids[[0, 2]].tolist()
    assert part.held_out_tokens == 14


def test_batches_are_int64_tensors(corpus: Corpus) -> None:
    """What torch's embedding and cross entropy want."""
    batch = corpus.batch(0, 3)
    assert isinstance(batch, Batch)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.shape == batch.labels.shape == (3, 8)


def test_a_tokenizer_from_a_directory(tmp_path: Path) -> None:
    """Any transformers tokenizer works; its bos goes before each document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "red": 3, "green": 4, "blue": 5}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "words")
    held = jsonl(tmp_path / "h.jsonl", {"text": "blue"})
    train = jsonl(
        tmp_path / "x.jsonl", {"text": "red green"}, {"prompt": "red", "completion": "blue"}
    )
    corpus = load("jsonl", train, held=held, seq_len=4, tokenizer=str(tmp_path / "words"))
    assert corpus.train.ids.tolist() == [[0, 3, 4, 1], [0, 3, 5, 1]]
    assert corpus.train.spans.tolist() == [[1, 4], [2, 4]]


def test_a_checkpoint_takes_no_other_vocabulary(tmp_path: Path) -> None:
    """A checkpoint's weights belong to ids; with another tokenizer they mean other words."""
    byte, own, bare = load_tokenizer("byte"), tmp_path / "own", tmp_path / "bare"
    byte.save_pretrained(own)
    bare.mkdir()
    check_tokenizer(byte, str(own))
    check_tokenizer(byte, str(bare))  # nothing to compare with
    other = transformers.ByT5Tokenizer(extra_ids=4)
    with pytest.raises(UserError, match=r"263 tokens.*\(259\).*Leave data.tokenizer out"):
        check_tokenizer(other, str(own))


def test_a_missing_tokenizer_is_told(tmp_path: Path) -> None:
    """With the reason and the way out for nodes without a network."""
    with pytest.raises(UserError, match=r"data.tokenizer=.* cannot be loaded.*no network"):
        load_tokenizer(str(tmp_path / "nothing"))
