"""Tokens are made once per facility, by one process, and read from disk by all others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.data import encoding, reading
from flwr_hpc.data.batches import Corpus, load_corpus


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count what is tokenized, a number per block of documents."""
    blocks: list[int] = []
    encoder = encoding._encoder

    def counting(tokenizer: object) -> object:
        encode = encoder(tokenizer)
        return lambda texts: (blocks.append(len(texts)) if texts else None, encode(texts))[1]

    monkeypatch.setattr(encoding, "_encoder", counting)
    return blocks


def corpus_of(tmp_path: Path, text: str = "some words. " * 50, **options: object) -> Corpus:
    file = tmp_path / "data.txt"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    data = DataConfig(kind="text", paths={"a": [str(file)]}, seq_len=16, **options)  # type: ignore[arg-type]
    return load_corpus(data, "a", ["a"], 0, tmp_path / "cache")


def test_a_later_job_reads_no_text(
    tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the GPUs of a successor from waiting for a corpus that was tokenized before."""
    first = corpus_of(tmp_path)
    assert encoded
    encoded.clear()
    monkeypatch.setattr(reading, "read", None)
    monkeypatch.setattr("flwr_hpc.data.token_cache._content", None)
    second = corpus_of(tmp_path)
    assert not encoded
    assert isinstance(second.train.ids, np.memmap)
    assert np.array_equal(first.train.ids, second.train.ids)
    assert np.array_equal(first.held.spans, second.held.spans)


def test_what_is_kept_belongs_to_content_and_settings(tmp_path: Path, encoded: list[int]) -> None:
    """A copy of the files is not tokenized anew; other words or lengths are."""
    one = corpus_of(tmp_path)
    encoded.clear()
    os.utime(tmp_path / "data.txt", (1, 1))
    corpus_of(tmp_path)
    assert not encoded
    other = corpus_of(tmp_path, "other words. " * 50)
    assert encoded
    assert not np.array_equal(one.train.ids[:5], other.train.ids[:5])
    encoded.clear()
    corpus_of(tmp_path, "other words. " * 50, held_out_fraction=0.3)
    assert encoded


def test_ranks_that_come_together_tokenize_once(tmp_path: Path, encoded: list[int]) -> None:
    """All but one wait, whichever comes first."""
    lengths: list[int] = []
    (tmp_path / "data.txt").write_text("some words. " * 50)
    threads = [
        threading.Thread(target=lambda: lengths.append(len(corpus_of(tmp_path).train)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(encoded) == 2  # training and held-out, once
    assert len(set(lengths)) == 1
    assert len(lengths) == 4


def test_a_killed_process_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not published is not used, and is removed by the next."""
    with monkeypatch.context() as patch:
        patch.setattr("flwr_hpc.data.token_cache.shutil.rmtree", lambda *_, **__: None)
        patch.setattr("flwr_hpc.data.token_cache.write_marks", _die)
        with pytest.raises(KeyboardInterrupt):
            corpus_of(tmp_path)
    folder = tmp_path / "cache" / "tokens"
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]
    whole = corpus_of(tmp_path)
    assert len(whole.train) > 10
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def _die(*_: object) -> None:
    raise KeyboardInterrupt


TOKENIZE = """
import tracemalloc
from flwr_hpc.config.schema import DataConfig
from flwr_hpc.data.batches import load_corpus

def load(texts):
    paths = {"paths": {"a": [texts]}, "held_out_paths": {"a": ["held"]}}
    return load_corpus(DataConfig(kind="text", seq_len=64, **paths), "a", ["a"], 0, None)

load("0000.txt")  # whose imports take memory, too
tracemalloc.start()
size = load("*.txt").train.ids.nbytes
print(tracemalloc.get_traced_memory()[1], size)
"""


def test_a_corpus_need_not_fit_into_memory(tmp_path: Path) -> None:
    """Protects hosts from corpora: training data pass through memory a block at a time."""
    (tmp_path / "held").write_text("held " * 20)
    for i in range(500):
        (tmp_path / f"{i:04}.txt").write_text(f"{i:04} words " * 1200)
    # In a process of its own: what threads of other tests take would count here.
    command = [sys.executable, "-c", TOKENIZE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size > 10_000_000
    assert peak < 0.8 * size
