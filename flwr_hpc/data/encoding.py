"""Examples into tokens, and which of these the loss is taken on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.data.packing import Answered, Block, Tokens
from flwr_hpc.data.reading import Example, Message
from flwr_hpc.errors import UserError

BLOCK_EXAMPLES, BLOCK_CHARACTERS = 1000, 2**18
BYTE_OFFSET = 3  # ByT5: pad, eos and unk come first
CHATML = "chatml"
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Turns = list[tuple[int, int]]  # Where they start and stop
_GENERATION = re.compile(r"\{%-?\s*generation\b")


def read_chat_template(data: DataConfig) -> str | None:
    """Return the template of ``data.chat_template``; None: the tokenizer's own."""
    if data.chat_template is None:
        return None
    if data.chat_template == CHATML:
        return _CHATML
    try:
        return Path(data.chat_template).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise UserError(
            f"data.chat_template={data.chat_template} cannot be read: {exc}. Give {CHATML}, or a "
            "file with a Jinja template"
        ) from None


def set_chat_template(tokenizer: Any, data: DataConfig) -> None:
    """Give a tokenizer the template of ``data.chat_template``, if any; it is exported with it."""
    if template := read_chat_template(data):
        tokenizer.chat_template = template


def encoded(
    examples: Iterable[Example], tokenizer: Any, two_sides: bool = False
) -> Iterator[Block]:
    """Yield the tokens of examples, as many at a time as memory easily holds.

    With `two_sides` a prompt has its end and a completion its start: an encoder reads the one, a
    decoder writes the other.
    """
    encode = _encoder(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    first = np.array([] if bos in (None, eos) else [bos], dtype)
    end, nothing = np.array([eos], dtype), first[:0]
    for some in _blocks(examples):
        documents: list[Tokens] = []
        answered: list[Answered] = []
        texts = encode([e.text for e in some if e.messages is None])
        prompts = iter(encode([e.prompt for e in some if e.prompt is not None]))
        rest = iter(texts)
        for example in some:
            if example.messages is not None:
                ids, spans = encode_chat(tokenizer, example.messages)
                answered.append((np.array(ids, dtype), spans))
                continue
            text = next(rest).astype(dtype)
            if example.prompt is None:
                documents.append(np.concatenate([first, text]))
            else:
                prompt = [first, next(prompts).astype(dtype), end if two_sides else nothing]
                whole = np.concatenate([*prompt, first if two_sides else nothing, text, end])
                answered.append((whole, [(sum(map(len, prompt)), len(whole))]))
        yield documents, answered


def encode_chat(tokenizer: Any, messages: list[Message]) -> tuple[list[int], Turns]:
    """Return a conversation's tokens, and where the assistant's turns start and stop in them.

    A template that marks what the assistant generates says so itself. Of others a turn is what its
    message adds to the prompt for it, as a reader of the model would ask for it, up to the end of
    the turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"records of messages need a chat template, and the tokenizer has none. Give "
            f"data.chat_template={CHATML}, or a file with a Jinja template"
        )
    try:
        template, special = tokenizer.get_chat_template(), tokenizer.special_tokens_map
        if _GENERATION.search(template):
            text, turns = _render(template, messages, return_assistant_tokens_mask=True, **special)
        else:
            text, turns = _by_prompts(template, messages, special)
    except UserError:
        raise
    except Exception as exc:  # of Jinja, or raised by the template: roles must alternate, ...
        raise UserError(
            f"the chat template does not take a record of roles "
            f"{', '.join(m['role'] for m in messages)}: {exc}"
        ) from None
    return _tokens_of(tokenizer, text, turns)


def _render(template: str, messages: list[Message], **options: Any) -> tuple[str, Turns]:
    """Return a conversation's text, and the places in it that the template marks, if asked for.

    (The mask over tokens of `apply_chat_template` learns all behind a mark that ends in a space.)
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template([messages], chat_template=template, **options)
    (text,), marked = rendered
    return str(text), marked[0] if marked else []


def _by_prompts(
    template: str, messages: list[Message], special: dict[str, Any]
) -> tuple[str, Turns]:
    whole, turns = _render(template, messages, **special)
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, _ = _render(template, messages[:place], add_generation_prompt=True, **special)
        turn, _ = _render(template, messages[: place + 1], **special)
        if not (whole.startswith(turn) and turn.startswith(prompt)):
            raise UserError(
                "the chat template writes a conversation differently when it goes on (as those "
                "that leave out earlier reasoning): what the model sees is not what it would have "
                "answered. Give data.chat_template=FILE with {% generation %} around the "
                "assistant's words, or one turn per record"
            )
        turns.append((len(prompt), len(turn)))
    return whole, turns


def _tokens_of(tokenizer: Any, text: str, turns: Turns) -> tuple[list[int], Turns]:
    """Return a text's tokens, and where in them the turns are.

    A token across a border is the turn's: an answer's first word with the space before it.
    """
    if not tokenizer.is_fast:  # and says no places; bytes are tokens of their own

        def tokens(part: str) -> list[int]:
            return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

        return tokens(text), [(len(tokens(text[:a])), len(tokens(text[:b]))) for a, b in turns]
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = made["offset_mapping"]
    learnt = [any(start < b and a < stop for a, b in turns) for start, stop in offsets]
    borders = np.flatnonzero(np.diff([0, *learnt, 0]))
    return list(made["input_ids"]), [(int(a), int(b)) for a, b in borders.reshape(-1, 2)]


def _blocks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Yield as many examples at a time as keep a tokenizer busy, and memory small."""
    block: list[Example] = []
    characters = 0
    for example in examples:
        block.append(example)
        characters += len(example.text)
        if len(block) == BLOCK_EXAMPLES or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[Tokens]]:
    import transformers

    if isinstance(tokenizer, transformers.ByT5Tokenizer):  # in Python, a thousand times slower
        return lambda texts: [
            np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.uint16) + BYTE_OFFSET
            for text in texts
        ]
    return lambda texts: (
        [
            np.array(ids, np.uint32)
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        if texts
        else []
    )
