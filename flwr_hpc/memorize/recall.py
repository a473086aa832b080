"""Verbatim recall: a passage's end, generated from its beginning (arXiv 2406.10209, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flwr_hpc.data.passages import Passage
from flwr_hpc.errors import UserError


@dataclass(frozen=True)
class Recall:
    """What became of one passage."""

    repetitions: int
    exact: bool  # Every token of its end
    rouge_l: float


@dataclass(frozen=True)
class Bucket:
    """All passages of one repetition count."""

    repetitions: int
    passages: int
    exact: float  # Share of passages
    rouge_l: float  # Mean


def rouge_l(found: Sequence[int], expected: Sequence[int]) -> float:
    """Return the F1 of the longest common subsequence (Lin, 2004), on tokens."""
    if not found or not expected:
        return 0.0
    row = [0] * (len(expected) + 1)
    for token in found:
        above = 0  # the row before, one to the left
        for i, other in enumerate(expected, 1):
            above, row[i] = row[i], above + 1 if token == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(found) + len(expected))


@torch.no_grad()
def recall(model: Any, tokenizer: Any, passages: Sequence[Passage], last: int = 50) -> list[Recall]:
    """Prompt with all but the `last` tokens of every passage and decode greedily.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
        Passages are tokenized as in training: without special tokens but a leading ``bos``.
    passages : sequence of Passage
    last : int
    """
    model.eval()
    longest = getattr(model.config, "max_position_embeddings", None)
    bos = tokenizer.bos_token_id
    first = [] if bos in (None, tokenizer.eos_token_id) else [bos]
    results = []
    for passage in passages:
        tokens = tokenizer(passage.text, add_special_tokens=False)["input_ids"]
        if len(tokens) <= last:
            raise UserError(
                f"a passage has {len(tokens)} tokens, and its last {last} are asked for: "
                f"'{passage.text[:40]}...'. Give longer passages, or --last {len(tokens) // 2}"
            )
        prompt, end = [*first, *tokens[:-last]], tokens[-last:]
        prompt = prompt[-(longest - last) :] if longest else prompt
        found = _greedy(model, prompt, last)
        results.append(Recall(passage.repetitions, found == end, rouge_l(found, end)))
    return results


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Decode `count` tokens, whatever they are: an end-of-text is a token like others here."""
    ids = torch.tensor([prompt], device=model.device)
    output = model(input_ids=ids, use_cache=True)
    found = []
    for _ in range(count):
        ids = output.logits[:, -1:].argmax(-1)
        found.append(int(ids))
        if len(found) < count:
            output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
    return found


def buckets(results: Sequence[Recall]) -> list[Bucket]:
    """Sum up by repetition count."""
    found = []
    for count in sorted({r.repetitions for r in results}):
        some = [r for r in results if r.repetitions == count]
        exact = sum(r.exact for r in some) / len(some)
        found.append(Bucket(count, len(some), exact, sum(r.rouge_l for r in some) / len(some)))
    return found
