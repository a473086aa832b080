"""What counts as recited, and passages among the training data."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.data.batches import Batch
from flwr_hpc.data.passages import Passage, read_passages, scatter
from flwr_hpc.data.reading import Example, with_passages
from flwr_hpc.errors import UserError
from flwr_hpc.memorize.__main__ import main
from flwr_hpc.memorize.recall import Recall, buckets, recall, rouge_l
from flwr_hpc.train.goldfish import training_batch
from flwr_hpc.train.loss import next_tokens, summed_loss


def _file(folder: Path, *records: object) -> Path:
    path = folder / "passages.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records))
    return path


def _noise(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_letters, k=length))


def test_passages_come_as_often_as_they_say(tmp_path: Path) -> None:
    """Protects the buckets: 0 is never trained on, and copies lie apart, the same every time."""
    file = _file(
        tmp_path, {"text": "often", "repetitions": 8}, {"text": "once", "repetitions": 1},
        {"text": "never", "repetitions": 0},
    )  # fmt: skip
    documents = [Example(f"d{i}") for i in range(100)]
    mixed = with_passages(documents, str(file))
    texts = [e.text for e in mixed]
    assert [texts.count(t) for t in ("often", "once", "never")] == [8, 1, 0]
    assert [e for e in mixed if e.text.startswith("d")] == documents
    places = [i for i, t in enumerate(texts) if t == "often"]
    assert places[-1] - places[0] > 50
    assert mixed == with_passages(iter(documents), str(file))
    assert scatter([], ["x"]) == ["x"]


@pytest.mark.parametrize("record", [{"text": "x"}, {"text": 1, "repetitions": 1}, [], "x",
                                    {"text": "x", "repetitions": -1}])  # fmt: skip
def test_a_bad_record_is_named(record: object, tmp_path: Path) -> None:
    """Protects users from a measurement of something else than they wrote."""
    with pytest.raises(UserError, match=r'line 2: not a record. A record is one line: \{"text"'):
        read_passages(_file(tmp_path, {"text": "x", "repetitions": 1}, record))


def test_rouge_l_by_hand() -> None:
    """Protects the formula: the common subsequence of 1 2 3 4 and 1 3 5 4 6 is 1 3 4."""
    assert rouge_l([1, 2, 3, 4], [1, 3, 5, 4, 6]) == pytest.approx(2 * 3 / 9)
    assert rouge_l([1, 2], [1, 2]) == 1
    assert rouge_l([1, 2], [3]) == 0


def test_buckets_are_means() -> None:
    """Protects the table."""
    found = buckets([Recall(4, True, 1.0), Recall(4, False, 0.5), Recall(0, False, 0.1)])
    assert [(b.repetitions, b.passages, b.exact) for b in found] == [(0, 1, 0.0), (4, 2, 0.5)]
    assert found[1].rouge_l == 0.75


class Reciter:
    """A model that knows one text by heart and answers everything else with token 0."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=None)

    def __init__(self, text: str) -> None:
        self.tokens = ByT5Tokenizer(extra_ids=0)(text, add_special_tokens=False)["input_ids"]
        self.seen: list[int] = []

    def eval(self) -> None:
        """Do nothing."""

    def __call__(self, input_ids: Any, past_key_values: Any = None, **_: Any) -> Any:
        self.seen = [*(self.seen if past_key_values else []), *input_ids[0].tolist()]
        known = self.tokens[: len(self.seen)] == self.seen and len(self.seen) < len(self.tokens)
        logits = torch.zeros(1, 1, 259)
        logits[0, 0, self.tokens[len(self.seen)] if known else 0] = 1
        return SimpleNamespace(logits=logits, past_key_values=True)


def test_recall_is_token_exact() -> None:
    """Protects the measure: the last 50 tokens, from the beginning, greedily."""
    text = _noise(0, 120)
    other = text[:-1] + "!"
    found = recall(Reciter(text), ByT5Tokenizer(extra_ids=0), [Passage(text, 3), Passage(other, 0)])
    assert [(r.repetitions, r.exact) for r in found] == [(3, True), (0, False)]
    assert found[1].rouge_l == pytest.approx(0.98)  # all but the last
    with pytest.raises(UserError, match=r"a passage has 10 tokens, and its last 50.*--last 5"):
        recall(Reciter(text), ByT5Tokenizer(extra_ids=0), [Passage(text[:10], 1)])


@pytest.mark.parametrize("loss", ["cross_entropy", "goldfish"])
def test_goldfish_keeps_a_model_from_reciting(loss: str, tmp_path: Path) -> None:
    """Protects the claim: what is recited with the plain loss is not with goldfish, k=4."""
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    texts = [_noise(seed, 96) for seed in range(4)]
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128,
    ))  # fmt: skip
    ids = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
    config = TrainConfig(loss=loss)
    batch = training_batch(Batch(ids, ids), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss_sum = summed_loss(model(input_ids=ids).logits, next_tokens(batch.labels))
        (loss_sum / 300).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = _file(tmp_path, *({"text": t, "repetitions": 150} for t in texts),
                 {"text": _noise(9, 96), "repetitions": 0})  # fmt: skip
    assert main([str(tmp_path / "model"), "--passages", str(file), "--out", str(tmp_path)]) == 0
    never, often = json.loads((tmp_path / "memorize.json").read_text())["buckets"]
    assert never["exact"] == 0
    assert often["exact"] == (1.0 if loss == "cross_entropy" else 0.0)
    assert (tmp_path / "memorize.png").stat().st_size > 1000


def test_mistakes_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects users from tracebacks."""
    (tmp_path / "config.yaml").write_text("data: {passages: p.jsonl}")
    assert main([str(tmp_path)]) == 2
    assert "has no model yet" in capsys.readouterr().err
    assert main(["some/model"]) == 2
    assert "--passages FILE" in capsys.readouterr().err
