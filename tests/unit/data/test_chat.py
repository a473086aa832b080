"""Conversations: every token of the assistant's turns is learnt and none of anybody else's."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.data import packing
from flwr_hpc.data.batches import Corpus, load_corpus, load_tokenizer
from flwr_hpc.data.encoding import encode_chat
from flwr_hpc.data.record_faults import record_fault
from flwr_hpc.errors import UserError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of Finland?"},
    {"role": "assistant", "content": "Helsinki."},
    {"role": "user", "content": "And of Chad?"},
    {"role": "assistant", "content": "N'Djamena."},
]
LEARNT = "Helsinki.<|im_end|>\nN'Djamena.<|im_end|>\n"


def corpus(folder: Path, *talks: Any, **options: Any) -> Corpus:
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    data = DataConfig(kind="jsonl", paths={"a": [str(file)]}, **{
        "chat_template": "chatml", "seq_len": 256, "held_out_paths": {"a": [str(_held(folder))]},
        **options,
    })  # fmt: skip
    return load_corpus(data, "a", ["a"], seed=1)


def _held(folder: Path) -> Path:
    file = folder / "held.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n")
    return file


def learnt(made: Corpus, labels: Any) -> list[str]:
    return [made.tokenizer.decode(row[row != -100]) for row in labels]


def test_the_loss_is_on_the_assistants_turns(tmp_path: Path) -> None:
    """Both of them, with the end of the turn; labels stand where their tokens are."""
    made = corpus(tmp_path, TALK, TALK[:3])
    batch = made.batch(0, 2)
    assert sorted(learnt(made, batch.labels), key=len) == ["Helsinki.<|im_end|>\n", LEARNT]
    taken = batch.labels != -100
    assert (batch.input_ids[taken] == batch.labels[taken]).all()
    assert made.train_tokens == int(taken.sum()) == len(LEARNT) + len("Helsinki.<|im_end|>\n")
    (held,) = made.held_out(0, 1, 1)
    assert made.held_out_tokens == int((held.labels != -100).sum()) == len(LEARNT)


@pytest.mark.parametrize("length", range(2, 13))
def test_a_conversation_that_is_cut_keeps_what_is_left(tmp_path: Path, length: int) -> None:
    """Wherever the cut falls, in memory and in a file behind documents; none without an answer."""
    talks: list[packing.Answered] = [
        (np.arange(10, 20, dtype=np.uint16), [(3, 5), (7, 9)]),
        (np.arange(30, 41, dtype=np.uint16), [(0, 2), (4, 5), (8, 11)]),
    ]
    expected = []
    for ids, spans in talks:
        learns = [any(a <= i < b for a, b in spans) and 0 < i < length for i in range(len(ids))]
        if any(learns):
            expected.append(ids[learns].tolist())
    documents = [np.full(2 * length, 5, np.uint16)]
    file = tmp_path / "train.ids"
    blocks = [(documents, talks[:1]), ([], talks[1:])]
    pack = partial(packing.pack_answered, seq_len=length, pad=0, dtype=np.uint16)
    marks = packing.stream(file, blocks, length, 1, np.uint16, pack)
    rows = np.fromfile(file, np.uint16).reshape(-1, length)
    streamed = packing.Sequences(rows, *marks)
    packed = pack(talks)
    both = packing.concatenate([packing.pack(documents, length, 1, 0, np.uint16), packed])
    for made in (packed, both, streamed):
        every = np.arange(len(made))
        taken = packing.labels(made.ids, made.spans)
        taken[packing.silent_tokens(made, every)] = packing.IGNORED
        told = [row[row != packing.IGNORED].tolist() for row in taken]
        assert [row for row in told if row and row[0] >= 10] == expected
        assert sum(map(len, told)) == made.tokens


GENERATION = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }} end {% endgeneration %}{% else %}{{ m.content }} end {% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m.role }} {% if loop.last or m.role != 'assistant' %}"
    "{{ m.content }}{% endif %} end {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def _words(template: str) -> Any:
    """Return a fast tokenizer of words with a chat template."""
    words = (
        "system user assistant end Be brief ? ' . Capital of Finland Helsinki And Chad N Djamena"
    )
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?!", *words.split()])}, "?!"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="end")
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [GENERATION, PLAIN], ids=["marked", "by prompts"])
def test_templates_with_and_without_marks_agree(template: str) -> None:
    """What a template calls generated is what follows the prompt for it."""
    tokenizer = _words(template)
    ids, spans = encode_chat(tokenizer, TALK)
    said = [tokenizer.decode(ids[start:stop]) for start, stop in spans]
    assert said == ["Helsinki . end", "N ' Djamena . end"]


def test_a_prompt_whose_end_melts_into_the_answer() -> None:
    """Protects templates and answers whose prompt ends in a space or a newline, and answers begin
    with one: tokens of the prompt alone are other ones."""
    inner = Tokenizer(models.WordLevel({"?!": 0, "assistant:": 1, " yes": 2, "\n\n": 3}, "?!"))
    pieces = pre_tokenizers.Split(Regex(r"\n+| ?[^ \n]+"), "isolated")
    inner.pre_tokenizer = pieces
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="?!")
    made.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    talk = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes\n"}]
    ids, spans = encode_chat(made, talk * 2)
    assert [ids[a:b] for a, b in spans] == [[2, 3], [2, 3]]
    assert [ids[a - 1] for a, _ in spans] == [1, 1]


def test_a_conversation_may_begin_with_the_assistant(tmp_path: Path) -> None:
    """A greeting is learnt like any other turn."""
    made = corpus(tmp_path, [TALK[2], *TALK[1:]])
    said = learnt(made, made.batch(0, 1).labels)
    assert said == ["Helsinki.<|im_end|>\n" + LEARNT]


@pytest.mark.parametrize("template", [GENERATION, PLAIN], ids=["marked", "by prompts"])
def test_bytes_take_templates_with_and_without_marks(template: str) -> None:
    """Protects tokenizers that do not say where in a text their tokens are."""
    tokenizer = load_tokenizer("byte")
    tokenizer.chat_template = template
    ids, spans = encode_chat(tokenizer, TALK)
    said = [tokenizer.decode(ids[start:stop]) for start, stop in spans]
    assert said == ["Helsinki. end ", "N'Djamena. end "]


def test_a_template_that_forgets_is_refused() -> None:
    """Protects from training on turns that the model would never have seen so."""
    with pytest.raises(UserError, match=r"differently when it goes on.*generation"):
        encode_chat(_words(FORGETFUL), TALK)


def test_messages_without_a_template_say_which_to_give(tmp_path: Path) -> None:
    """The byte tokenizer has none."""
    with pytest.raises(UserError, match=r"data\.chat_template=chatml"):
        corpus(tmp_path, TALK, chat_template=None)
    with pytest.raises(UserError, match=r"chat_template=/nowhere cannot be read"):
        corpus(tmp_path, TALK, chat_template="/nowhere")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    """A file with Jinja, also as part of what the tokenizer is exported with."""
    file = tmp_path / "own.jinja"
    file.write_text(PLAIN)
    made = corpus(tmp_path, TALK, chat_template=str(file))
    assert learnt(made, made.batch(0, 1).labels) == ["Helsinki. end N'Djamena. end "]
    made.tokenizer.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == PLAIN


def test_another_template_makes_other_tokens(tmp_path: Path) -> None:
    """Protects the cache of tokens from answering with those of the template before."""
    cache, file = tmp_path / "cache", tmp_path / "own.jinja"
    file.write_text(PLAIN)
    talks, counts = tmp_path / "t.jsonl", []
    talks.write_text(json.dumps({"messages": TALK}) + "\n")
    for template in ("chatml", str(file), "chatml"):
        data = DataConfig(
            kind="jsonl", paths={"a": [str(talks)]}, chat_template=template,
            held_out_paths={"a": [str(_held(tmp_path))]}, seq_len=256,
        )  # fmt: skip
        counts.append(int(np.count_nonzero(load_corpus(data, "a", ["a"], 1, cache).train.ids)))
    assert counts[0] == counts[2] != counts[1]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", "'messages' must be a list of objects with 'role' and 'content', found a string"),
        (["hi"], "message 1 is a string"),
        ([{"role": "user"}], "'content' of message 1 must be a string, found none"),
        ([{"role": 3, "content": "x"}], "'role' of message 1 must be a string, found a number"),
        (
            TALK[:2],
            "no message has the role 'assistant', whose words are learnt; found system, user",
        ),
        ([], "found no message"),
    ],
)
def test_faults_of_a_conversation(messages: Any, words: str) -> None:
    """Each in words, before any job is submitted."""
    assert words in str(record_fault(DataConfig(), json.dumps({"messages": messages})))
    assert record_fault(DataConfig(), json.dumps({"messages": TALK})) is None
