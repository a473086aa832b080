"""Prompts and completions reach an encoder-decoder as transformers' T5 takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flwr_hpc.config.schema import DataConfig, ModelConfig
from flwr_hpc.data.batches import Corpus, load_corpus
from flwr_hpc.data.sources import check
from flwr_hpc.errors import UserError
from flwr_hpc.train.loss import IGNORED, add_loss, count_tokens
from flwr_hpc.train.model import build

PAIRS = [
    ("translate English to German: a house", "ein Haus"),
    ("short", "und nun eine recht lange Antwort, die nicht passt"),
    ("a prompt that is longer than what an encoder reads at most", "kurz"),
    ("", "nichts"),
    ("nothing", ""),
]
SEQ_LEN, TARGET_LEN = 39, 21


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A T5 tokenizer whose words are letters: its folder."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(97 + i), -3.0) for i in range(26)]
    folder = tmp_path_factory.mktemp("t5") / "tokenizer"
    transformers.T5Tokenizer(vocab=[*special, *letters], extra_ids=0).save_pretrained(folder)
    return str(folder)


def corpus(folder: Path, tokenizer: str, *pairs: tuple[str, str], **options: Any) -> Corpus:
    file = folder / "pairs.jsonl"
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = {"a": [str(file)]}
    held = folder / "held.jsonl"
    held.write_text(json.dumps({"prompt": "held", "completion": "out"}) + "\n")
    data = DataConfig("jsonl", paths, {"a": [str(held)]}, **{
        "objective": "seq2seq", "tokenizer": tokenizer, "seq_len": SEQ_LEN,
        "target_len": TARGET_LEN, **options,
    })  # fmt: skip
    return load_corpus(data, "a", ["a"], seed=1)


def by_transformers(name: str, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Return what transformers' own tokenizer and collator make of pairs."""
    made = transformers.AutoTokenizer.from_pretrained(name)
    rows = [
        {
            **made(prompt, max_length=SEQ_LEN, truncation=True),
            "labels": made(text_target=wanted, max_length=TARGET_LEN, truncation=True).input_ids,
        }
        for prompt, wanted in pairs
    ]
    collate = transformers.DataCollatorForSeq2Seq(made, pad_to_multiple_of=8)
    return dict(collate(rows))


@pytest.mark.parametrize("kind", ["t5", "byte"])
def test_batches_are_those_of_transformers(tmp_path: Path, tokenizer: str, kind: str) -> None:
    """Ids, ends, cuts, padding, labels and mask: a checkpoint goes on as it was trained."""
    name = tokenizer
    if kind == "byte":
        name = str(tmp_path / "byte")
        transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(name)
    made = corpus(tmp_path, name, *PAIRS)
    order = made.rows(0, len(PAIRS)).tolist()
    batch = made.batch(0, len(PAIRS))
    expected = by_transformers(name, [PAIRS[row] for row in order])
    prompts, labels = expected["input_ids"][:, :SEQ_LEN], expected["labels"][:, :TARGET_LEN]
    assert batch.attention_mask is not None
    assert torch.equal(batch.input_ids, prompts)
    assert torch.equal(batch.attention_mask, expected["attention_mask"][:, :SEQ_LEN])
    assert torch.equal(batch.labels[:, 1:], labels)
    assert (batch.labels[:, 0] == IGNORED).all()
    assert made.train_tokens == int((labels != IGNORED).sum()) == count_tokens(batch.labels)
    assert made.too_long == (
        "records of more tokens than data.seq_len=39 (prompt) or data.target_len=21 (completion): "
        "2 cut"
    )
    (held,) = made.held_out(0, 1, 4)
    assert made.held_out_tokens == count_tokens(held.labels) == 1 + len("out") + (kind == "t5")
    assert made.batch(1, 1).input_ids.shape[1] <= batch.input_ids.shape[1]


@pytest.mark.parametrize("chunk_bytes", [2**28, 4 * 3 * 30 * 4])
def test_the_loss_is_that_of_calling_t5(tmp_path: Path, tokenizer: str, chunk_bytes: int) -> None:
    """Padding is neither read nor learnt; the decoder starts as T5's does. Gradients, too."""
    made = corpus(tmp_path, tokenizer, *PAIRS)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 44, "num_layers": 2, "num_heads": 2}
    config = ModelConfig(config={"model_type": "t5", "dropout_rate": 0.0, **sizes})
    model: Any = build(config, made.tokenizer, 0, SEQ_LEN).model.eval()
    expected = by_transformers(tokenizer, [PAIRS[row] for row in made.rows(0, 5)])
    theirs = model(**expected).loss
    theirs.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    batch = made.batch(0, 5)
    ours = add_loss(model, chunk_bytes)(
        batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask
    ) / count_tokens(batch.labels)
    ours.backward()  # type: ignore[no-untyped-call]
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "alone"}, r"takes records of 'prompt' and 'completion', found 'text'"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, r"found 'messages'.*prompt_key"),
        ({"prompt": "?", "completed": "!"}, r"'completion' is missing.*'completed'"),
        ({"prompt": "?", "completion": None}, r"'completion' is missing"),
    ],
)
def test_other_records_are_refused(
    tmp_path: Path, tokenizer: str, record: dict[str, Any], words: str
) -> None:
    """By the preflight and by the job, with the line, and what would be taken."""
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps(record))
    data = DataConfig("jsonl", {"a": [str(file)]}, objective="seq2seq", tokenizer=tokenizer)
    for look in (check, lambda *args: load_corpus(*args, seed=1)):
        with pytest.raises(UserError, match=f"facility a: .*x.jsonl, line 2: .*{words}"):
            look(data, "a", ["a"])


def test_columns_are_settable(tmp_path: Path, tokenizer: str) -> None:
    """A translation corpus has columns of its own."""
    file = tmp_path / "x.jsonl"
    file.write_text(
        "".join(json.dumps({"en": f"house {i}", "de": "haus"}) + "\n" for i in range(9))
    )
    data = DataConfig(
        "jsonl", {"a": [str(file)]}, objective="seq2seq", tokenizer=tokenizer, seq_len=16,
        prompt_key="en", completion_key="de",
    )  # fmt: skip
    made = load_corpus(data, "a", ["a"], seed=1)
    wanted = made.batch(0, 1).labels[0, 1:7]
    assert made.tokenizer.decode(wanted[:5]) == "haus"
    assert wanted[5] == made.tokenizer.eos_token_id
    assert not made.too_long
