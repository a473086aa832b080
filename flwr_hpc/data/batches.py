"""A facility's data as batches of token sequences, the same on every machine."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.config.validate import SEQ2SEQ, SPAN_CORRUPTION
from flwr_hpc.data import packing, reading, seq2seq, sources, token_cache
from flwr_hpc.data.encoding import encoded, set_chat_template
from flwr_hpc.data.packing import Sequences
from flwr_hpc.data.passages import read_passages
from flwr_hpc.data.span_corruption import SpanCorruption, span_corruption
from flwr_hpc.errors import UserError

BYTE = "byte"


@dataclass(frozen=True)
class Batch:
    """Token sequences and what is to be predicted of them."""

    # Labels are unshifted, as transformers expects them, and -100 where no loss is taken; the
    # first of each sequence always is, so ``(labels != -100).sum()`` counts the tokens the
    # loss is taken on.
    input_ids: torch.Tensor
    labels: torch.Tensor
    # Places of the tokens in their documents; None: a sequence is one document.
    places: torch.Tensor | None = None
    apart: bool = True  # Documents of a sequence do not see each other
    # Of what an encoder reads: 1 for its tokens, 0 for padding; None: there is none.
    attention_mask: torch.Tensor | None = None

    @property
    def position_ids(self) -> torch.Tensor | None:
        """What keeps documents apart in the model; None: nothing."""
        return self.places if self.apart else None

    def pinned(self) -> Batch:
        """Return it in memory from which a GPU copies while it computes."""
        return self._each(torch.Tensor.pin_memory)

    def part(self, rows: slice) -> Batch:
        """Return some of the sequences."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        places, mask = (t if t is None else change(t) for t in (self.places, self.attention_mask))
        return Batch(change(self.input_ids), change(self.labels), places, self.apart, mask)


@dataclass
class DataCursor:
    """A facility's place in its endless stream of sequences.

    It counts sequences and not steps, so that none comes twice or never when another number of
    ranks goes on.
    """

    sequences: int = 0  # Used up

    def first(self, rank: int, per_rank: int) -> int:
        """Return where a rank's part of the next step begins."""
        return self.sequences + rank * per_rank

    def advance(self, rank_count: int, per_rank: int) -> None:
        """Count a step."""
        self.sequences += rank_count * per_rank


@dataclass(frozen=True)
class Corpus:
    """Training and held-out sequences of one facility."""

    tokenizer: Any  # ``len(tokenizer)`` is the vocabulary's size
    facility: str
    seed: int
    train: Sequences
    held: Sequences
    held_out_sequences: int
    corruption: SpanCorruption | None = None  # Of an encoder-decoder's sequences
    document_mask: bool = False
    prompt_len: int | None = None  # Tokens that an encoder reads at most, of `seq2seq`

    @property
    def train_tokens(self) -> int:
        """Tokens of one epoch the loss is taken on."""
        if self.corruption:
            return len(self.train) * self.corruption.target_length
        return self.train.tokens - self.document_mask * len(self.train.starts)

    @property
    def held_out_tokens(self) -> int:
        """Tokens one evaluation takes the loss on, over all ranks."""
        if self.corruption:
            return len(self._held_rows) * self.corruption.target_length
        tokens = int(np.diff(self.held.spans[self._held_rows]).sum())
        tokens -= int(packing.silent_tokens(self.held, self._held_rows).sum())
        if self.document_mask:
            tokens -= int(packing.first_tokens(self.held, self._held_rows).sum())
        return tokens

    @property
    def too_long(self) -> str:
        """Say of how many records something was cut off, or all; nothing if of none."""
        cut, dropped = (int(n) for n in self.train.lost + self.held.lost)
        if not cut + dropped:
            return ""
        length = self.train.ids.shape[1]
        limits = f"data.seq_len={self.prompt_len or length}"
        if self.prompt_len:
            limits += f" (prompt) or data.target_len={length - self.prompt_len} (completion)"
        gone = f", {dropped} left out, as nothing to learn was left of them" if dropped else ""
        return f"records of more tokens than {limits}: {cut} cut{gone}"

    def batch(self, first: int, count: int) -> Batch:
        """Return `count` sequences from the `first` on; see `DataCursor`.

        The facility's sequences are reshuffled for every epoch and read one after the other
        without end.
        """
        return self._batch(self.train, self.rows(first, count), np.arange(first, first + count))

    def rows(self, first: int, count: int) -> NDArray[np.int64]:
        """Return which sequences these are."""
        rows = np.empty(count, np.int64)
        for i in range(count):
            epoch, place = divmod(first + i, len(self.train))
            rows[i] = _epoch_order(self.seed, self.facility, epoch, len(self.train))[place]
        return rows

    def held_out(self, rank: int, rank_count: int, sequences: int) -> Iterator[Batch]:
        """Yield this rank's share of the held-out sequences, `sequences` at a time.

        Over all ranks every chosen sequence comes once. All ranks yield equally many batches,
        because a sharded model's forward pass is collective; where the sequences do not divide
        evenly, a batch may be all padding (no label but -100: take a sum, not a mean).
        """
        rows = self._held_rows
        share = rows[rank::rank_count]
        for i in range(0, -(-len(rows) // rank_count), sequences):
            if len(part := share[i : i + sequences]):
                yield self._batch(self.held, part, part)
            else:
                spare = self._batch(self.held, rows[:1], rows[:1])
                ignored = torch.full_like(spare.labels, packing.IGNORED)
                yield dataclasses.replace(spare, labels=ignored)

    def _batch(
        self, source: Sequences, rows: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> Batch:
        """Return rows; a corrupted one depends on its place in the stream, and so on the epoch."""
        ids = source.ids[rows]
        if self.corruption:
            stream = [self.seed, zlib.crc32(self.facility.encode()), int(source is self.held)]
            inputs, labels = self.corruption.batch(ids, stream, positions)
            return Batch(torch.from_numpy(inputs), torch.from_numpy(labels))
        if self.prompt_len:
            both = seq2seq.sides(source, rows, self.prompt_len, _padding(self.tokenizer))
            prompts, mask, completions = (torch.from_numpy(side) for side in both)
            return Batch(prompts, completions, attention_mask=mask)
        labels = packing.labels(ids, source.spans[rows])
        labels[packing.silent_tokens(source, rows)] = packing.IGNORED
        tokens = torch.from_numpy(ids.astype(np.int64))
        first = packing.first_tokens(source, rows)
        if not first.any():
            return Batch(tokens, torch.from_numpy(labels))
        if self.document_mask:
            labels[first] = packing.IGNORED  # the end of another document says nothing of it
        places = torch.from_numpy(packing.positions(first))
        return Batch(tokens, torch.from_numpy(labels), places, self.document_mask)

    @property
    def _held_rows(self) -> NDArray[np.int64]:
        count = min(self.held_out_sequences, len(self.held))
        return np.arange(count) * len(self.held) // count


def load_corpus(
    data: DataConfig,
    facility: str,
    facilities: Sequence[str],
    seed: int,
    cache: Path | None = None,
) -> Corpus:
    """Read, tokenize and pack a facility's data, unless that was done before.

    Parameters
    ----------
    data : DataConfig
    facility : str
    facilities : sequence of str
        All facilities of the federation.
    seed : int
        Of the order of the training sequences.
    cache : Path, optional
        Folder that keeps the tokens, for all ranks and later jobs.
    """
    found = sources.resolve(data, facility, facilities)
    corrupted, pairs = data.objective == SPAN_CORRUPTION, data.objective == SEQ2SEQ
    tokenizer = load_tokenizer(data.tokenizer or BYTE, sentinels=corrupted)
    set_chat_template(tokenizer, data)
    corruption = span_corruption(data.seq_len, tokenizer) if corrupted else None
    length = corruption.length if corruption else data.seq_len
    target_len = (data.target_len or data.seq_len) if pairs else 0
    build = functools.partial(
        _tokenize, data=data, lengths=(length, target_len), found=found, tokenizer=tokenizer
    )
    settings = {
        "tokenizer": _identity(tokenizer), "lengths": [length, target_len], "kind": data.kind,
        "keys": [data.text_key, data.prompt_key, data.completion_key, data.messages_key],
        "split": found.split, "chat_template": getattr(tokenizer, "chat_template", None),
        "objective": data.objective,
        "held_out": [data.held_out_fraction, len(found.held_out)],
        "passages": [astuple(p) for p in read_passages(data.passages)] if data.passages else [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:  # what is mapped from there stays readable
        root = cache / "tokens" if cache else Path(scratch)
        train, held = token_cache.sequences(root, found.files, settings, build)
    corpus = Corpus(
        tokenizer, facility, seed, train, held, data.held_out_sequences, corruption,
        data.document_mask, data.seq_len if pairs else None,
    )  # fmt: skip
    for what, part in (("to train on", corpus.train), ("held out", corpus.held)):
        if not len(part):
            dropped = int(part.lost[1])
            raise UserError(
                f"facility {facility}: the data {what} ({len(found.files)} file(s), "
                f"{sum(p.stat().st_size for p in found.files)} bytes in all) makes no sequence "
                f"of data.seq_len={data.seq_len} tokens. "
                + (
                    f"{dropped} record(s) had nothing to learn within so many: raise data.seq_len"
                    if dropped
                    else "Add data, or lower data.seq_len"
                )
            )
    return corpus


def load_tokenizer(name: str, *, sentinels: bool = False) -> Any:
    """Load the tokenizer ``byte``, one from a local directory, or one by its hub name.

    That of bytes has `sentinels` where the objective needs them.
    """
    import transformers

    if name == BYTE:
        return transformers.ByT5Tokenizer(extra_ids=125 if sentinels else 0)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as exc:  # transformers raises many kinds
        raise UserError(
            f"data.tokenizer={name} cannot be loaded: {_first_line(exc)}. "
            "Valid: byte, a local directory with a tokenizer, or a hub name. Compute nodes "
            "often have no network: download it on the login node first (hf download NAME "
            "--local-dir DIR) and give data.tokenizer=DIR"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer={name} has no end-of-sequence token, so it is none of a causal "
            "language model"
        )
    return tokenizer


def check_tokenizer(tokenizer: Any, model: str) -> None:
    """Refuse another vocabulary than that of the checkpoint `model`, if one came with it."""
    import transformers

    try:
        own = transformers.AutoTokenizer.from_pretrained(model)
    except Exception:  # many kinds; then only the sizes can be compared, when the model is built
        return
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"data.tokenizer has another vocabulary ({len(tokenizer)} tokens) than model.path="
            f"{model} was trained on ({len(own)}): its ids would mean other words. Leave "
            "data.tokenizer out to take the checkpoint's own"
        )


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0].rstrip(".")


def _tokenize(
    folder: Path,
    data: DataConfig,
    lengths: tuple[int, int],
    found: sources.Sources,
    tokenizer: Any,
) -> None:
    """Write a facility's sequences; the training data pass through memory a block at a time.

    The lengths are of a sequence, and of what a decoder writes besides (0: nothing).
    """
    length, target_len = lengths
    tables = folder / "tables"  # of Hugging Face datasets
    read, kept = reading.separate(data, found, tables)
    if data.passages:
        read = reading.with_passages(read, data.passages)
    train, held = (encoded(e, tokenizer, two_sides=bool(target_len)) for e in (read, kept))
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    eos, pad = tokenizer.eos_token_id, _padding(tokenizer)
    row = length + target_len
    pack_records = functools.partial(packing.pack_answered, seq_len=row, pad=pad, dtype=dtype)
    if target_len:
        pack_records = functools.partial(
            seq2seq.pack, seq_len=length, target_len=target_len, eos=eos, pad=pad, dtype=dtype
        )
    marks = packing.stream(folder / "train.ids", train, row, eos, dtype, pack_records)
    token_cache.write_marks(folder, "train", marks, row, dtype)
    blocks = list(held)
    documents = [document for block, _ in blocks for document in block]
    answered = [one for _, block in blocks for one in block]
    made = [packing.pack(documents, row, eos, pad, dtype), pack_records(answered)]
    kept_rows = packing.concatenate(made)
    if data.objective == SPAN_CORRUPTION:  # which takes no padding
        kept_rows = packing.whole(kept_rows)
    token_cache.write(folder, "held", kept_rows)
    shutil.rmtree(tables, ignore_errors=True)


def _padding(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def _identity(tokenizer: Any) -> list[Any]:
    """Return what tells a tokenizer from any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [type(tokenizer).__name__, words, special]


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, facility: str, epoch: int, count: int) -> NDArray[np.int64]:
    # Sorting raw bits: numpy promises their stream for all time, that of its shuffles not.
    bits = np.random.PCG64([seed, zlib.crc32(facility.encode()), epoch])
    return np.argsort(bits.random_raw(count), kind="stable")
