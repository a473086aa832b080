"""Passages that are put among the training documents, each as often as its record says."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flwr_hpc.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Passage:
    """A text whose recall is measured later."""

    text: str
    repetitions: int  # 0: never trained on, for comparison


def read_passages(path: str | Path) -> list[Passage]:
    """Read JSON lines of ``text`` and ``repetitions``."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as exc:
        raise UserError(f"passages {path} cannot be read: {exc}") from None
    found = [_passage(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"passages {path}: no record. {_EXAMPLE}")
    return found


_EXAMPLE = 'A record is one line: {"text": "...", "repetitions": 16}'


def _passage(path: str | Path, number: int, line: str) -> Passage:
    try:
        record = json.loads(line)
        passage = Passage(record["text"], record["repetitions"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"passages {path}, line {number}: not a record. {_EXAMPLE}") from None
    count = passage.repetitions
    if not isinstance(passage.text, str) or type(count) is not int or count < 0:
        raise UserError(f"passages {path}, line {number}: not a record. {_EXAMPLE}")
    return passage


def scatter(documents: Iterable[T], copies: Iterable[T]) -> list[T]:
    """Put copies at random places among documents; the same places every time."""
    own, others = list(documents), list(copies)
    draw = random.Random(0)
    places = sorted([(draw.random(), i) for i in range(len(others))])
    keyed = [((i + 0.5) / len(own), document) for i, document in enumerate(own)]
    mixed = keyed + [(place, others[i]) for place, i in places]
    return [item for _, item in sorted(mixed, key=lambda pair: pair[0])]
