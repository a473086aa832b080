"""What the ranks of `test_loading` do; importable, so that it can be sent to processes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from worlds.train.torch_ranks import LLAMA, tiny_model, tiny_trainer, weights_of

from flwr_hpc.errors import UserError
from flwr_hpc.train import random_weights, weights
from flwr_hpc.train.parallel.sharding import meshes, shard
from flwr_hpc.train.rendezvous import Group


def growth(group: Group, path: Path, small: Path) -> dict[str, float]:
    """Return how many bytes this rank's own memory has grown, as shares of the float32 model."""
    _loaded(group, small)  # what is imported and allocated once
    return _loaded(group, path)


def _loaded(group: Group, path: Path) -> dict[str, float]:
    gc.collect()
    before = _own_bytes()
    model = tiny_model(path=str(path)).model
    whole = 4.0 * sum(p.numel() for p in model.parameters())
    built = _own_bytes()
    over = meshes(group.ranks.world_size, group.device)
    shard(model, over, group.device, "fp32", one_unit_below=0)
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.float32}, kinds
    return {"built": (built - before) / whole, "sharded": (_own_bytes() - before) / whole}


def drawn(group: Group, model: dict[str, Any]) -> dict[str, float]:
    """Return how far this rank's own memory has grown, likewise, for random weights."""
    with drawn_apart():
        _drawn(group, LLAMA)
        return _drawn(group, model)


def _drawn(group: Group, config: dict[str, Any]) -> dict[str, float]:
    gc.collect()
    before = _own_bytes()
    built = tiny_model(model=config, draw_later=True)
    whole = 4.0 * sum(p.numel() for p in built.model.parameters())
    grown = [_own_bytes() - before]

    def draw(part: nn.Module) -> None:
        built.draw(part)
        grown.append(_own_bytes() - before)

    over = meshes(group.ranks.world_size, group.device)
    shard(built.model, over, group.device, "fp32", one_unit_below=0, draw=draw)
    assert len(grown) == 2 + config["num_hidden_layers"]
    return {"built": grown[0] / whole, "most": max(grown) / whole}


@contextmanager
def drawn_apart() -> Iterator[None]:
    """Draw the weights of small models as of large ones."""
    known, random_weights.LARGE = random_weights.LARGE, 0
    try:
        yield
    finally:
        random_weights.LARGE = known


def begun(group: Group, folder: Path, **options: Any) -> dict[str, Any]:
    """Return what a model begins with."""
    with drawn_apart():
        return weights_of(tiny_trainer(group, **options), folder / "begun.safetensors", group)


def trained_from_random(group: Group, folder: Path, **options: Any) -> dict[str, Any]:
    """Train what was drawn layer by layer; return losses and weights."""
    with drawn_apart():
        return _trained(group, folder, **options)


def _own_bytes() -> int:
    """Return the memory that is of no file."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def trained(group: Group, folder: Path, path: Path, **options: Any) -> dict[str, Any]:
    """Train a checkpoint; return losses and weights."""
    return _trained(group, folder, path=str(path), **options)


def loaded(group: Group, folder: Path, path: Path) -> dict[str, Any]:
    """Return the weights of a checkpoint as the trainer has them."""
    trainer = tiny_trainer(group, path=str(path))
    return weights_of(trainer, folder / "loaded.safetensors", group)


def _trained(group: Group, folder: Path, **options: Any) -> dict[str, Any]:
    trainer = tiny_trainer(group, **options)
    losses: list[float] = []
    trainer.train(4, report=lambda _, loss: losses.append(loss()))
    return {
        "losses": losses, "weights": weights_of(trainer, folder / "weights.safetensors", group),
    }  # fmt: skip


def bytes_read(group: Group, folder: Path, **options: Any) -> list[list[int]]:
    """Return of each rank how many bytes it read and checked of a file, and how many it holds."""
    trainer, path = tiny_trainer(group, **options), folder / "weights.safetensors"
    trainer.save_weights(path)
    group.broadcast(None)
    check, read = weights.check_values, [0]

    def counted(name: str, bits: Any, *args: Any) -> None:
        read[0] += bits.nbytes
        check(name, bits, *args)

    weights.check_values = counted
    try:
        trainer.load_weights(path)
    finally:
        weights.check_values = check
    held = sum(4 * shard.numel() for shard in trainer.shards())
    every: list[list[int]] = [[]] * group.ranks.world_size
    torch.distributed.all_gather_object(every, [read[0], held])
    return every


def refusals(group: Group, folder: Path, row: int, value: float, **options: Any) -> list[str]:
    """Spoil one number of a file; return what the loading of it says on every rank."""
    trainer, path = tiny_trainer(group, **options), folder / "weights.safetensors"
    trainer.save_weights(path)
    if group.ranks.rank == 0:
        tensors = load_file(path)
        tensors["model.embed_tokens.weight"][row, 3] = value
        save_file(tensors, path)
    group.broadcast(None)
    words = "taken"
    try:
        trainer.load_weights(path)
    except UserError as exc:
        words = str(exc)
    every = [""] * group.ranks.world_size
    torch.distributed.all_gather_object(every, words)
    return every
