"""Groups of processes that hold torch, and a tiny model and corpus for them."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worlds.jobs import STALLED_S
from worlds.train import forked

from flwr_hpc.config.schema import LoraConfig, ModelConfig, TrainConfig
from flwr_hpc.data.batches import Batch
from flwr_hpc.exchange.compression.encoder import Encoder
from flwr_hpc.exchange.shards.manifest import WeightFiles
from flwr_hpc.train.loss import CHUNK_BYTES, IGNORED
from flwr_hpc.train.model import Built, build
from flwr_hpc.train.rendezvous import Group, join
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.ranks import Ranks

VOCABULARY = 67  # odd, so that shards are uneven
SEQ_LEN = 16
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TRAIN = TrainConfig(
    steps=6,
    micro_batch=4,
    lr=1e-2,
    warmup_steps=2,
    clip=0.5,
    weight_decay=0.1,
    precision="fp32",
    # Not smaller than the gradients of these models: Adam would amplify rounding errors.
    eps=1e-6,
)


class TinyTokenizer:
    """As much of a tokenizer as building a model needs."""

    bos_token_id, eos_token_id, pad_token_id = None, 1, 0

    def __len__(self) -> int:
        return VOCABULARY

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


class TinyCorpus:
    """Random sequences by global position; later ones take the loss on fewer tokens.

    The mask is for encoders alone.
    """

    def _sequences(self, first: int, count: int) -> Batch:
        ids = torch.empty(count, SEQ_LEN, dtype=torch.int64)
        labels, mask = torch.empty_like(ids), torch.ones_like(ids)
        for row, position in enumerate(range(first, first + count)):
            draw = torch.Generator().manual_seed(position)
            ids[row] = torch.randint(2, VOCABULARY, (SEQ_LEN,), generator=draw)
            labels[row] = ids[row]
            labels[row, : position * 5 % (SEQ_LEN - 2)] = IGNORED
            mask[row, SEQ_LEN - position % 4 :] = 0
        return Batch(ids, labels, attention_mask=mask)

    def batch(self, first: int, count: int) -> Batch:
        return self._sequences(first, count)

    def held_out(self, rank: int, rank_count: int, sequences: int) -> Iterator[Batch]:
        """Five batches, so that of two ranks one gets a batch without a label."""
        for i in range(rank, rank + -(-5 // rank_count) * rank_count, rank_count):
            batch = self._sequences(10_000 + 3 * i, 3)
            if i >= 5:
                batch.labels.fill_(IGNORED)
            yield batch


def tiny_model(
    tied: bool = True,
    lora: bool = False,
    path: str | None = None,
    checkpointing: str = "none",
    model: dict[str, Any] | None = None,
    freeze_a: bool = False,
    seed: int = 0,
    dora: bool = False,
    quantize: str = "none",
    lora_r: int | None = None,
    targets: str = "all-linear",
    draw_later: bool = False,
) -> Built:
    config = ModelConfig(
        path=path,
        config={} if path else model or {**LLAMA, "tie_word_embeddings": tied},
        lora=LoraConfig(
            r=4 if lora or dora else 0,
            alpha=8,
            dora=dora,
            freeze_a=freeze_a,
            quantize=quantize,
            target_modules=targets,
        ),
    )
    return build(config, TinyTokenizer(), seed, SEQ_LEN, checkpointing, lora_r, draw_later)


def tiny_trainer(
    group: Group,
    tied: bool = True,
    lora: bool = False,
    one_unit_below: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
    path: str | None = None,
    model: dict[str, Any] | None = None,
    dora: bool = False,
    quantize: str = "none",
    lora_r: int | None = None,
    targets: str = "all-linear",
    encoder: Encoder | None = None,
    **train: Any,
) -> Trainer:
    """Build a trainer; every layer a unit of its own unless `one_unit_below` says otherwise."""
    config = dataclasses.replace(TRAIN, **train)
    built = tiny_model(
        tied, lora, path, config.activation_checkpointing, model, dora=dora, quantize=quantize,
        lora_r=lora_r, targets=targets, draw_later=True,
    )  # fmt: skip
    return Trainer(
        built, TinyCorpus(), config, TRAIN.steps, group, one_unit_below, chunk_bytes, encoder
    )


@dataclass
class Team:
    """Processes connected as the ranks of one allocation; each runs what it is sent."""

    pipes: list[Connection]
    processes: list[Any]

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function(group, ...)`` on every rank and return what rank 0 returned."""
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        answers = [pipe.recv() for pipe in self.pipes]
        for error, _ in answers:
            assert not error, error
        return answers[0][1]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(STALLED_S)


def start_teams(
    folders: Callable[[str], Path], sizes: Sequence[int], fresh: bool = False
) -> Iterator[dict[int, Team]]:
    """Yield teams by size, for a fixture; `fresh` ones read torch themselves."""
    teams = {size: start_team(folders(f"team{size}"), size, fresh) for size in sizes}
    yield teams
    for team in teams.values():
        team.close()


def start_team(folder: Path, size: int, fresh: bool = False) -> Team:
    context = forked.context(fresh)
    pipes, processes = [], []
    for rank in range(size):
        mine, theirs = context.Pipe()
        ranks = Ranks(rank, size, rank, size)
        process = context.Process(target=_serve, args=(theirs, folder, ranks), daemon=True)
        process.start()
        pipes.append(mine)
        processes.append(process)
    return Team(pipes, processes)


def _serve(pipe: Connection, folder: Path, ranks: Ranks) -> None:
    torch.set_num_threads(1)
    group = join(folder, ranks, timeout_s=600)
    while task := pipe.recv():
        function, args, kwargs = task
        try:
            pipe.send(("", function(group, *args, **kwargs)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
    group.close()


def weights_of(trainer: Trainer, path: Path, group: Group) -> dict[str, np.ndarray]:
    """Write the trainer's weights and read them back; a collective call."""
    staged = trainer.stage_weights(path)
    staged.publish()
    return read_back(staged.path) if group.ranks.rank == 0 else {}


def read_back(path: Path) -> dict[str, np.ndarray]:
    """Return what a file of weights, or a manifest of shards, holds."""
    found = WeightFiles.open(path).whole
    return {name: found.tensor(name) for name in found.layout}
