"""Files into examples, and examples into training and held-out ones."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.config.validate import NEXT_TOKEN, RECORDS
from flwr_hpc.data import sources
from flwr_hpc.data.passages import read_passages, scatter
from flwr_hpc.data.record_faults import columns, messages_fault
from flwr_hpc.data.sources import Sources
from flwr_hpc.errors import UserError

Message = dict[str, Any]  # ``role`` and ``content``, and whatever else a chat template reads


class Example(NamedTuple):
    """A document (neither prompt nor messages), a prompt and its completion, or a conversation."""

    text: str  # Of a conversation its messages as JSON
    prompt: str | None = None
    messages: list[Message] | None = None


def separate(
    data: DataConfig, found: Sources, cache: Path | None
) -> tuple[Iterable[Example], Iterable[Example]]:
    """Read training and held-out examples, one at a time: they may not fit into memory."""
    everything = partial(read, data, found.facility, found.train, cache)
    if found.split == "files":
        return everything(), read(data, found.facility, found.held_out, cache)
    if found.split == "tail":
        kept = 1 - data.held_out_fraction
        heads = (Example(e.text[: int(len(e.text) * kept)]) for e in everything())
        return heads, (Example(e.text[int(len(e.text) * kept) :]) for e in everything())
    return _separate_records(everything, data.held_out_fraction, found.facility)


def with_passages(train: Iterable[Example], path: str) -> list[Example]:
    """Put the passages of a file among training examples, each as often as it says."""
    copies = [Example(p.text) for p in read_passages(path) for _ in range(p.repetitions)]
    return scatter(train, copies)


def _separate_records(
    read_all: Callable[[], Iterator[Example]], fraction: float, facility: str
) -> tuple[Iterable[Example], Iterable[Example]]:
    """Hold out records by the hash of their content: equal records never stand on both sides."""
    hashes = np.unique(np.fromiter((_hash(example) for example in read_all()), np.uint64))
    if len(hashes) < 2:
        raise UserError(
            f"facility {facility}: found {len(hashes)} distinct record(s) in the data; at "
            "least 2 are needed, for training and held out. "
            f"Or name files to hold out: 'data.held_out_paths.{facility}=[/path/*]'"
        )
    least, most = int(hashes[0]), int(hashes[-1])
    bound = max(least, min(int(fraction * 2**64), most - 1))  # neither side empty
    return (
        (e for e in read_all() if _hash(e) > bound),
        (e for e in read_all() if _hash(e) <= bound),
    )


def _hash(example: Example) -> int:
    content = f"{example.prompt or ''}\0{example.text}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def read(
    data: DataConfig, facility: str, paths: Sequence[Path], cache: Path | None
) -> Iterator[Example]:
    """Yield the examples of some files in order; blank documents are left out."""
    if data.kind == "stdlib":  # directly: `datasets` would add a second to the start
        for path in paths:
            yield Example(path.read_text(encoding="utf-8", errors="replace"))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tables"
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(cache)  # `datasets` puts the whole path into a lock's file name
        try:
            rows = _dataset(data.kind, [str(path) for path in paths], str(folder))
        except Exception as exc:  # whatever kind a reader raises: find the line ourselves
            _find_fault(data, facility, paths)
            raise UserError(f"facility {facility}: cannot read the data: {exc}") from exc
        for block in rows.iter(100):  # by columns: ten times faster than by rows
            columns = list(block)
            for values in zip(*block.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                yield from _example(data, facility, paths, row)


def _dataset(kind: str, files: list[str], folder: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if kind == "jsonl":
        return datasets.Dataset.from_json(files, cache_dir=folder)
    if kind == "parquet":
        return datasets.Dataset.from_parquet(files, cache_dir=folder)
    return datasets.Dataset.from_text(files, cache_dir=folder, sample_by="document")


def _example(
    data: DataConfig, facility: str, paths: Sequence[Path], row: dict[str, Any]
) -> Iterator[Example]:
    if data.objective != NEXT_TOKEN and data.kind in RECORDS:
        _check_objective(data, facility, paths, row)
    prompt, completion = row.get(data.prompt_key), row.get(data.completion_key)
    if data.kind != "text" and isinstance(prompt, str) and isinstance(completion, str):
        yield Example(completion, prompt)
        return
    if data.kind != "text" and (messages := row.get(data.messages_key)) is not None:
        if messages_fault(data, messages):
            _find_fault(data, facility, paths)
        turns = [{k: v for k, v in message.items() if v is not None} for message in messages]
        yield Example(json.dumps(turns, ensure_ascii=False, sort_keys=True), messages=turns)
        return
    text = row.get("text" if data.kind == "text" else data.text_key)
    if not isinstance(text, str):
        _find_fault(data, facility, paths)
        raise UserError(
            f"facility {facility}: a record of {paths[0]}{' and more' * (len(paths) > 1)} has "
            f"neither '{data.text_key}' nor '{data.prompt_key}' and '{data.completion_key}' "
            f"as strings, nor '{data.messages_key}'; found "
            f"{', '.join(k for k, v in row.items() if v is not None)}"
        )
    if text.strip():
        yield Example(text)


def _check_objective(
    data: DataConfig, facility: str, paths: Sequence[Path], row: dict[str, Any]
) -> None:
    fault = columns(data, [key for key, value in row.items() if value is not None])
    if isinstance(fault, str):
        _find_fault(data, facility, paths)
        raise UserError(f"facility {facility}: a record of {paths[0]}: {fault}")


def _find_fault(data: DataConfig, facility: str, paths: Sequence[Path]) -> None:
    for path in paths:
        sources.scan(data, facility, path)
